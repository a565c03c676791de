"""Block formats in configurations: the one notation, and plain data for what is written down."""

from collections.abc import Sequence
from typing import Any

from jsonargparse.typing import register_type

from lowbit import BlockFormat, block_format
from lowbit.formats import named
from lowbit.formats import to_plain as write_format

__all__ = ["read_format", "read_formats", "write_format"]
from train.config.notation import plain_format


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


register_type(BlockFormat, serializer=write_format, deserializer=read_format)
