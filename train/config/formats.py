"""Block formats in configurations: the one notation, and plain data for what is written down."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from jsonargparse.typing import register_type

from lowbit import BlockFormat, block_format
from lowbit.formats import named
from lowbit.formats import to_plain as write_format
from lowbit.recipe import OPERANDS
from train.config.notation import plain_format
from train.config.strict_yaml import load_yaml

__all__ = ["check_flagged_formats", "check_formats", "read_format", "read_formats", "write_format"]


def read_format(written: Any) -> BlockFormat:
    """`mxint8`, {name: mxint8, scale_rule: floor, ...}, or the file of such a mapping."""
    return block_format(plain_format(written))


def read_formats(written: Sequence[Any]) -> list[BlockFormat]:
    """Several, in order; ValueError for one given twice, and for two of one name."""
    formats = list(map(read_format, written))
    twice = sorted({str(format) for format in formats if formats.count(format) > 1})
    if twice:
        raise ValueError(f"formats given more than once: {', '.join(twice)}")
    names = [format.name for format in formats if named(format.name) is None]
    if shared := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"different formats have the name {', '.join(shared)}")
    return formats


def check_formats(plain: Any, place: str = "") -> None:
    """ValueError, in one line that names the key, where a configuration has what is no format:
    jsonargparse, which meets it as one of a union's types, would say what is wrong with each.
    """
    for key, written in _written(plain, place):
        try:
            read_format(written)
        except (ValueError, OSError) as error:
            raise ValueError(f"{key}: {error}") from None


def check_flagged_formats(words: Sequence[str]) -> None:
    """The same for `--diagnostics` and its fields among the words of a command line."""
    for word, following in pairwise([*words, ""]):
        flag, equals, value = word.partition("=")
        if flag.startswith("--diagnostics"):
            *place, name = flag[2:].split(".")
            check_formats({name: load_yaml(value if equals else following)}, ".".join(place))


def _written(plain: Any, place: str) -> Iterator[tuple[str, Any]]:
    """(key, what stands there) of all formats: operands, and lists called `formats`."""
    is_list = isinstance(plain, list | tuple)
    inside: Iterable[Any] = plain.items() if isinstance(plain, Mapping) else ()
    for name, value in enumerate(plain) if is_list else inside:
        key = f"{place}.{name}".lstrip(".")
        if name in OPERANDS and value is not None:
            yield key, value
        elif name == "formats" and isinstance(value, list | tuple):
            yield from ((f"{key}.{index}", each) for index, each in enumerate(value))
        else:
            yield from _written(value, key)


register_type(BlockFormat, serializer=write_format, deserializer=read_format)
