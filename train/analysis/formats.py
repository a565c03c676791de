"""The formats an analysis looks at, by name, how they pair up, and how they are drawn."""

from collections.abc import Sequence

from lowbit import BlockFormat, IntFormat, Rounding, ScaleFormat
from lowbit.formats import NAMED
from train.config.formats import read_formats
from train.output.figures import COLORS

PAIRS = (("mxint8", "mxfp8"), ("mxint6", "mxfp6"), ("mxint4", "mxfp4"), ("nvint4", "nvfp4"))
"""Integer against float: what the INT-v-FP study compares."""
BLOCK_SCALED = tuple(n for n, f in NAMED.items() if f.scale in (ScaleFormat.E8M0, ScaleFormat.E4M3))
"""All named MX and NV formats."""


def formats_called(written: Sequence[str], *, two_d: bool = False) -> list[BlockFormat]:
    """The formats, in order; ValueError for one given twice, and for what is not cast so."""
    formats = read_formats(written)
    for format in formats:
        if not two_d and isinstance(format.block_size, tuple):
            raise ValueError(f"{format}: 2-D blocks are for weights, here all have one axis")
        if format.rounding is Rounding.STOCHASTIC:
            raise ValueError(f"{format}: casts are not drawn, give another rounding")
    return formats


def style(format: BlockFormat) -> dict[str, str]:
    """Colour by width (FP32 and BF16 scales black), integers solid, floats dashed or dotted."""
    variant = format.name.endswith(("e5m2", "e3m2"))
    color = {8: COLORS[1], 6: COLORS[3], 4: COLORS[2]}.get(format.element.bits, COLORS[4])
    if format.scale in (ScaleFormat.FP32, ScaleFormat.BF16):
        color = COLORS[0]
    if isinstance(format.element, IntFormat):
        return {"color": color, "linestyle": "-"}
    return {
        "color": color,
        "linestyle": (":" if format.element.bits == 8 else "-.") if variant else "--",
    }
