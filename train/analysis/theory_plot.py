"""theory.png and .svg: QSNR curves of the formats by scale, and the measured points on them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowbit import BlockFormat, ScaleFormat, block_format
from lowbit.theory import Convention, crossover, curve
from train.analysis.formats import PAIRS, style
from train.output.figures import save

MARKERS = {"gaussian": "o", "laplace": "s", "student-t 4": "^"}


def plot(
    formats: Sequence[BlockFormat],
    convention: Convention,
    measured: Sequence[dict[str, Any]],
    stem: Path,
) -> None:
    """E8M0 scales on the left, all others on the right."""
    left = [format for format in formats if format.scale == ScaleFormat.E8M0]
    right = [format for format in formats if format.scale != ScaleFormat.E8M0]
    panels = [(title, group) for title, group in zip(TITLES, (left, right), strict=True) if group]
    figure = Figure(figsize=(6 * len(panels), 5.4), layout="constrained")
    for axes, (title, group) in zip(
        figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True
    ):
        _panel(axes, group, convention, measured)
        axes.set_title(f"{title}, ρ = {convention.rho(group[0])}", fontsize=11)
        axes.set_xlabel("crest factor of a block, max / RMS", fontsize=12)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.legend(fontsize=9, framealpha=1, edgecolor="none", ncols=2, loc="upper right")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("QSNR (dB)", fontsize=12)
    save(figure, stem)


TITLES = ("E8M0 scales", "FP32 row scales (int8, ρ = 1) and E4M3 scales (nv…)")


def _panel(
    axes: Axes,
    formats: Sequence[BlockFormat],
    convention: Convention,
    measured: Sequence[dict[str, Any]],
) -> None:
    last = 10.0 if formats[0].scale == ScaleFormat.E8M0 else 8.0
    crests = [1 + i * (last - 1) / 400 for i in range(401)]
    for format in formats:
        axes.plot(crests, curve(format, crests, convention), label=str(format), **style(format))  # type: ignore[arg-type]
    names = [str(format) for format in formats]
    for data, marker in MARKERS.items():
        points = [row for row in measured if row["data"] == data and row["format"] in names]
        for row in points:
            color = style(formats[names.index(row["format"])])["color"]
            axes.plot(row["crest"], row["measured dB"], marker, color=color, markersize=5,
                      markerfacecolor="none")  # fmt: skip
        axes.plot([], [], marker, color="#555555", markerfacecolor="none", label=f"on {data}")
    for pair in PAIRS:
        if set(pair) <= set(names):
            found = crossover(block_format(pair[0]), block_format(pair[1]), convention)
            axes.plot(found.crest, found.qsnr_db, "x", color="black", markersize=8)
    axes.plot([], [], "x", color="black", label="crossing")
    sizes = {format.block_size for format in formats if isinstance(format.block_size, int)}
    for crest in sorted(size**0.5 for size in sizes if size > 0):
        axes.axvline(crest, color="#999999", linewidth=1, linestyle=(0, (1, 3)))
        axes.text(crest, 0.6, f" no block of {crest**2:.0f}\n reaches beyond", fontsize=8.5)
    axes.set_xlim(1, last)
    axes.set_ylim(0, 62)
