"""Figures of `lowbit analyze`: QSNR against crest factor, and QSNR over layers and depth."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lowbit import BlockFormat
from lowbit.recipe import OPERANDS
from lowbit.theory import EXACT, curve
from train.analysis.formats import PAIRS
from train.analysis.operands import Findings, Look
from train.output.figures import COLORS, save


def plot_scatter(found: Findings, look: Look, out: Path) -> Path:
    """One panel a pair (or a lone format): a point per tensor, and the theory for Gaussians."""
    by_name = {str(format): format for format in look.formats}
    groups = [[by_name[n] for n in pair] for pair in PAIRS if set(pair) <= by_name.keys()]
    paired = {str(format) for group in groups for format in group}
    groups += [[format] for name, format in by_name.items() if name not in paired]
    columns = min(4, len(groups))
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(4 * columns, 3.8 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, group in zip(panels, groups, strict=False):
        for format, color, marker in zip(group, (COLORS[1], COLORS[2]), "o^", strict=False):
            _points(axes, found, format, look, color, marker)
        axes.set_xlabel("crest factor (mean over blocks)")
        axes.set_ylabel("QSNR (dB)")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.legend(fontsize=8, framealpha=0.9, edgecolor="none")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    rotation = look.rotations[0]
    figure.suptitle(f"Points: tensors (rotation {rotation}). Lines: theory, Gaussian blocks.")
    save(figure, out / "qsnr_crest")
    return out / "qsnr_crest.png"


def _points(
    axes: Any, found: Findings, format: BlockFormat, look: Look, color: str, marker: str
) -> None:
    rows = [r for r in found.qsnr if r["format"] == str(format)]
    rows = [r for r in rows if r["rotation"] == look.rotations[0] and np.isfinite(r["qsnr_db"])]
    crest = [row["crest"] for row in rows]
    axes.plot(crest, [row["qsnr_db"] for row in rows], marker, color=color, markersize=3,
              markerfacecolor="none", alpha=0.5, label=str(format))  # fmt: skip
    along = np.linspace(max(1.0, 0.95 * min(crest, default=1.0)), 1.05 * max(crest, default=2.0))
    axes.plot(along, curve(format, along.tolist(), EXACT), color=color, linewidth=1.5)


def plot_heat(found: Findings, look: Look, out: Path) -> Path:
    """The first format's QSNR: one panel an operand, layer types over depth."""
    rows = [r for r in found.qsnr if r["format"] == str(look.formats[0])]
    rows = [r for r in rows if r["rotation"] == look.rotations[0]]
    types = list(dict.fromkeys(row["type"] for row in rows))
    depths = sorted({row["depth"] for row in rows})
    values = np.array([row["qsnr_db"] for row in rows])
    low, high = np.nanpercentile(values, [1, 99])  # one outlier would use up the colours
    figure = Figure(figsize=(12, 2 + 0.55 * len(types) * 1.5), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True).flatten()
    for axes, operand in zip(panels, OPERANDS, strict=True):
        grid = np.full((len(types), len(depths)), np.nan)
        for row in rows:
            if row["operand"] == operand:
                grid[types.index(row["type"]), depths.index(row["depth"])] = row["qsnr_db"]
        image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=low, vmax=high)
        axes.set_title(operand, fontsize=11)
        axes.set_yticks(range(len(types)), types, fontsize=9)
        ticks = range(0, len(depths), max(1, len(depths) // 6))
        axes.set_xticks(ticks, [str(depths[i]) for i in ticks])
    for axes in panels[3:]:
        axes.set_xlabel("depth (block)")
    bar = figure.colorbar(image, ax=list(panels), extend="both")
    bar.set_label(f"QSNR of {look.formats[0]} (dB), rotation {look.rotations[0]}")
    save(figure, out / "qsnr_layers")
    return out / "qsnr_layers.png"
