"""What all figures share: colours, and files that are the same for the same content."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterMathtext, NullFormatter, StrMethodFormatter

# Okabe and Ito's palette, told apart by colour-blind readers; black is the baseline's, yellow last
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#F0E442")


matplotlib.rcParams["text.parse_math"] = False  # names of folders may hold a $


def save(figure: Figure, stem: Path) -> None:
    """As PNG and SVG, the same bytes for the same content."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if isinstance(axis.get_major_formatter(), LogFormatterMathtext):  # math is not parsed
                axis.set_major_formatter(StrMethodFormatter("{x:g}"))
                axis.set_minor_formatter(NullFormatter())
    figure.savefig(stem.with_suffix(".png"), dpi=150)
    with matplotlib.rc_context({"svg.hashsalt": "lowbit"}):
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
