"""How formats are written: names that say all there is to say, and plain data for the rest."""

import re
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, TypeVar

from lowbit.kinds.elements import SCALES, FloatFormat, IntFormat, ScaleFormat
from lowbit.kinds.rules import Arithmetic, OuterScale, Rounding, ScaleRounding, ScaleRule

Made = TypeVar("Made")
_INT, _FLOAT = r"int(\d+)", r"(\d+)m(\d+)(?:max([\d.]+(?:e\+\d+)?))?"
_FAMILY = re.compile(rf"(mx|nv)?({_INT}|e{_FLOAT})(?:_(ue{_FLOAT}|{'|'.join(SCALES)}))?")
_BLOCK = re.compile(r"(.+)_b(\d+)(?:x(\d+))?")
_LABEL = re.compile(rf"(?:^|[^a-z])(?:mx|nv)?({_INT}|e{_FLOAT})(?![a-z\d])")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")


def element_of(plain: Any) -> IntFormat | FloatFormat:
    """`int5`, `e3m4`, {bits: 5}, {bits: 8, symmetric: false}, {exponent_bits: 3, mantissa_bits: 4,
    max: 15.5}.
    """
    if isinstance(plain, IntFormat | FloatFormat):
        return plain
    if isinstance(plain, str):
        if found := re.fullmatch(_INT, plain):
            return IntFormat(int(found[1]))
        if found := re.fullmatch(f"e{_FLOAT}", plain):
            return FloatFormat(int(found[1]), int(found[2]), float(found[3] or 0))
    what = "int5, e3m4, {bits: 5} or {exponent_bits: 3, mantissa_bits: 4}"
    otherwise = f"element: {plain!r} is none of {what}"
    if isinstance(plain, Mapping) and "bits" in plain:
        return _made(IntFormat, plain, {"bits", "symmetric"}, otherwise)
    return _made(FloatFormat, plain, _FIELDS, otherwise)


def scale_of(plain: Any) -> ScaleFormat:
    """`e8m0`, `e4m3`, `bf16`, `fp32`, `ue5m3`, {exponent_bits: 5, mantissa_bits: 3}."""
    if isinstance(plain, ScaleFormat):
        return plain
    if isinstance(plain, str):
        if plain in SCALES:
            return SCALES[plain]
        if found := re.fullmatch(f"u?e{_FLOAT}", plain):
            return ScaleFormat(int(found[1]), int(found[2]), float(found[3] or 0))
    what = f"{', '.join(SCALES)}, ue5m3 or {{exponent_bits: 5, mantissa_bits: 3}}"
    return _made(ScaleFormat, plain, _FIELDS, f"scale: {plain!r} is none of {what}")


_FIELDS = {"exponent_bits", "mantissa_bits", "max"}


def _made(kind: Callable[..., Made], plain: Any, fields: set[str], otherwise: str) -> Made:
    if not isinstance(plain, Mapping) or plain.keys() - fields:
        raise ValueError(otherwise)
    if missing := fields - {"max", "symmetric"} - plain.keys():
        raise ValueError(f"{otherwise}: {', '.join(sorted(missing))} is missing")
    return kind(**plain)


def asymmetric(element: IntFormat | FloatFormat, symmetric: Any) -> IntFormat:
    """Integers whose range is, or is not, symmetric."""
    if not isinstance(element, IntFormat) or not isinstance(symmetric, bool):
        raise ValueError(
            f"symmetric={symmetric}: true or false, of integers; not {element.label}'s"
        )
    return IntFormat(element.bits, symmetric)


def symmetry(before: Any, now: Any) -> bool | None:
    """Whether integers of the same bits are symmetric now; None where nothing else changed."""
    match before, now:
        case IntFormat(bits=b, symmetric=s), IntFormat(bits=c, symmetric=t) if b == c and s != t:
            return t
    return None


def plain_of(value: Any) -> Any:
    """A field as plain data, which `element_of`, `scale_of` and `choice` read."""
    match value:
        case IntFormat(symmetric=False):
            return dict(vars(value))
        case IntFormat() | FloatFormat():
            return value.label
        case ScaleFormat() | Enum():
            return value.value
        case tuple():
            return list(value)
    return value


def choice(kinds: tuple[type[Enum], ...], plain: Any, field: str) -> Enum:
    """The member of this value; ValueError lists them."""
    members = {member.value: member for kind in kinds for member in kind}
    if plain in members.values():
        return plain  # type: ignore[no-any-return]  # a member
    if not isinstance(plain, str) or plain not in members:
        raise ValueError(f"{field}={plain!r} is none of {', '.join(members)}")
    return members[plain]


_KINDS: dict[str, tuple[type[Enum], ...]] = {
    "scale_rule": (ScaleRule, ScaleRounding),
    "rounding": (Rounding,),
    "arithmetic": (Arithmetic,),
    "outer_scale": (OuterScale,),
}


def parsed(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a format from plain data, or as they are."""
    found = dict(changes)
    for field, kinds in _KINDS.items():
        if found.get(field) is not None:
            found[field] = choice(kinds, found[field], field)
    for field, read in (("element", element_of), ("scale", scale_of)):
        if field in found:
            found[field] = read(found[field])
    if isinstance(found.get("block_size"), list):
        found["block_size"] = tuple(found["block_size"])
    return found


def checked_name(name: Any) -> str:
    """A name that files and tables can bear."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"name: {name!r} is no name of letters, digits, `_`, `-`, `.` and `+`")
    if name == "bf16":
        raise ValueError("name: bf16 is the baseline's, which is no block format")
    return name


def spelt_in(name: str) -> dict[str, Any] | None:
    """Fields of a format that a name spells, `mxint5`, `nve3m2`, `e2m1_ue5m3`; None for others.

    `mx`: E8M0 scales and blocks of 32, `nv`: E4M3 scales and blocks of 16.
    """
    if not (found := _FAMILY.fullmatch(name)) or not (found[1] or found[7]):
        return None
    family = {"mx": "e8m0", "nv": "e4m3", None: ""}[found[1]]
    try:
        element, scale = element_of(found[2]), scale_of(found[7] or family)
    except ValueError:  # mxint9
        return None
    return {"element": element, "scale": scale, "block_size": 16 if found[1] == "nv" else 32}


def block_in(name: str) -> tuple[str, int | tuple[int, int]] | None:
    """(the rest, the block) of a name like `mxint8_b16`, `mxint8_b16x16`."""
    if not (found := _BLOCK.fullmatch(name)):
        return None
    return found[1], (int(found[2]), int(found[3])) if found[3] else int(found[2])


def element_in(name: str) -> IntFormat | FloatFormat | None:
    """The element that a name has among its words; None where it says none."""
    try:
        return element_of(found[1]) if (found := _LABEL.search(name)) else None
    except ValueError:
        return None


def automatic_name(element: IntFormat | FloatFormat, scale: ScaleFormat) -> str:
    """One that `spelt_in` reads."""
    label = element.label if not isinstance(element, IntFormat) else f"int{element.bits}"
    family = {"e8m0": "mx", "e4m3": "nv"}.get(scale.value)
    return f"{family}{label}" if family else f"{label}_{scale.value}"
