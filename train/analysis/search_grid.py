"""The formats that `lowbit search` tries: every element, scale, block and rule of a stated grid."""

from collections.abc import Iterator
from itertools import product

from lowbit import BlockFormat, FloatFormat, IntFormat, OuterScale, block_format
from lowbit.formats import NAMED
from lowbit.kinds.elements import ScaleFormat
from lowbit.kinds.rules import rules_of

ELEMENTS: tuple[IntFormat | FloatFormat, ...] = (
    *(IntFormat(bits) for bits in range(2, 9)),
    *(
        FloatFormat(exponent, bits - 1 - exponent)
        for bits in range(3, 9)
        for exponent in range(1, min(5, bits - 1) + 1)
    ),
)
SCALES = (
    *(ScaleFormat.E8M0, ScaleFormat.E4M3, ScaleFormat(5, 3), ScaleFormat(4, 4)),
    *(ScaleFormat.BF16, ScaleFormat.FP32),
)
BLOCKS = (8, 16, 32, 64, 128)
GRID = (
    f"{len(ELEMENTS)} elements (int2 to int8, all floats of 3 to 8 bits with 1 to 5 of exponent) x"
    f" scales {', '.join(scale.value for scale in SCALES)} x blocks of"
    f" {', '.join(map(str, BLOCKS))} x every rule of the scale"
)
DEPTH = 1.0  #: bits below the budget within which formats are tried


def grid(bits: float) -> list[BlockFormat]:
    """Those of more than `bits` - 1 and at most `bits` bits a value, scale included; and all named
    formats in blocks, to be seen beside them.
    """
    found = {str(format): format for format in NAMED.values() if format.block_size != -1}
    for format in _all():
        if bits - DEPTH < format.bits_per_value <= bits and format not in found.values():
            found[str(format)] = format
    return list(found.values())


def _all() -> Iterator[BlockFormat]:
    for element, scale, block in product(ELEMENTS, SCALES, BLOCKS):
        for rule in rules_of(scale, element):
            try:
                yield block_format(
                    {"element": element.label, "scale": scale.value, "block_size": block,
                     "scale_rule": rule.value}
                )  # fmt: skip
            except ValueError:  # an element times a scale beyond FP32
                continue


def of_a_sample(format: BlockFormat) -> BlockFormat:
    """The same for rows that are each a tensor's sample: the tensor's scale is the row's."""
    if format.outer is not OuterScale.TENSOR:
        return format
    return block_format(format, outer_scale="row")
