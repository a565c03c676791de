"""The figure of `lowbit search`: bits against QSNR, the Pareto front, the named formats."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lowbit.formats import NAMED
from train.output.figures import COLORS, save


def plot(rows: Sequence[dict[str, Any]], bits: float, source: str, out: Path) -> None:
    """As search.png and .svg."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for word, color, kind in (("integer", COLORS[1], True), ("float", COLORS[2], False)):
        own = [row for row in rows if ("int" in row["format"]) is kind]
        axes.plot([r["bits"] for r in own], [r["qsnr_db"] for r in own], "o", color=color,
                  markersize=4, alpha=0.35, markeredgewidth=0, label=f"{word}s")  # fmt: skip
    front = sorted((row["bits"], row["qsnr_db"]) for row in rows if row["pareto"])
    axes.step(*zip(*front, strict=True), where="post", color=COLORS[3], label="Pareto front")
    named = [row for row in rows if row["format"] in NAMED]
    for row in named:
        axes.plot(row["bits"], row["qsnr_db"], "D", color=COLORS[0], markersize=5)
        axes.annotate(row["format"], (row["bits"], row["qsnr_db"]), xytext=(4, 4),
                      textcoords="offset points", fontsize=8)  # fmt: skip
    axes.set_xlabel("bits a value, scale included")
    axes.set_ylabel("mean QSNR (dB)")
    axes.set_title(f"{len(rows)} formats, budget {bits:g} bits\n{source[:100]}", fontsize=9)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.legend(loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, out / "search")
