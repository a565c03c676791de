"""Block formats in YAML: a name, or a name and changes."""

from typing import Any

from jsonargparse.typing import register_type

from lowbit import Arithmetic, BlockFormat, Rounding, ScaleFormat, ScaleRule, block_format

_ENUMS = {
    "scale": ScaleFormat,
    "scale_rule": ScaleRule,
    "rounding": Rounding,
    "arithmetic": Arithmetic,
}


def read_format(value: Any) -> BlockFormat:
    """`mxint8`, or {name: mxint8, scale_rule: floor, symmetric: false, ...}."""
    if isinstance(value, BlockFormat):
        return value
    if isinstance(value, str):
        return block_format(value)
    if not isinstance(value, dict) or "name" not in value:
        raise ValueError(f"{value!r} is neither a format's name nor a mapping with `name`")
    changes = dict(value)
    name = changes.pop("name")
    for field, enum in _ENUMS.items():
        if changes.get(field) is not None:
            changes[field] = enum(changes[field])
    if isinstance(changes.get("block_size"), list):
        changes["block_size"] = tuple(changes["block_size"])
    if "symmetric" in changes:
        element = block_format(name).element
        changes["element"] = type(element)(element.bits, symmetric=changes.pop("symmetric"))  # type: ignore[call-arg]  # a float element raises
    return block_format(name, **changes)


def write_format(format: BlockFormat) -> Any:
    """What `read_format` reads."""
    plain: dict[str, Any] = {}
    for field, value in format.changes().items():
        if field == "element":
            plain["symmetric"] = value.symmetric
        elif field in _ENUMS:
            plain[field] = None if value is None else value.value
        else:
            plain[field] = list(value) if isinstance(value, tuple) else value
    return {"name": format.name} | plain if plain else format.name


register_type(BlockFormat, serializer=write_format, deserializer=read_format)
