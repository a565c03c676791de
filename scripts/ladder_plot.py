"""The picture of scripts/ladder.py: training gap and the cast's KL against bits per value."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import matplotlib.lines
import matplotlib.patches
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train.output.figures import COLORS, save

if TYPE_CHECKING:
    from ladder import Rung

INTEGER, FLOAT, PLAIN = COLORS[1], COLORS[2], "#555555"  # blue and vermillion, by element
MILLI = 1e3  # gaps are drawn in thousandths of a nat
PLACES = {4.25: 0.0, 4.5: 1.0, 6.25: 2.0, 8.25: 3.0, 8.5: 4.0}  # of bits per value, evenly spaced
FAMILIES = ("MX", "NV", "MX", "MX", "NV")
ASIDE = 0.11  # by which an integer stands left of its float, and what is beside them further out


def draw(rungs: list["Rung"], floor: float | None, stem: Path) -> None:
    """Two panels over bits, and one of the published recipe's steps; `floor`: the control's KL."""
    points = [rung for rung in rungs if rung.is_uniform]
    steps = [rung for rung in rungs if not rung.is_uniform and not rung.control]
    controls = [rung for rung in rungs if rung.control]
    matplotlib.use("Agg")
    with matplotlib.rc_context({"font.size": 12, "axes.spines.top": False,
                                "axes.spines.right": False}):  # fmt: skip
        figure = Figure(figsize=(11, 8), layout="constrained")
        grid = figure.add_gridspec(2, 2, width_ratios=(2.2, 1))
        below = figure.add_subplot(grid[1, 0])
        above = figure.add_subplot(grid[0, 0], sharex=below)
        aside = figure.add_subplot(grid[:, 1])
        _kl(above, points, floor)
        _training(below, points, controls)
        steps.sort(key=lambda rung: rung.label == "nvfp4")  # all of them, last
        _steps(aside, [rung for rung in points if rung.label == "nvfp4_plain"] + steps, controls)
        save(figure, stem)


def _kl(axes: Axes, points: list["Rung"], floor: float | None) -> None:
    own = [rung for rung in points if rung.cast]
    for rung in own:
        assert rung.cast is not None
        _point(axes, rung, rung.cast["kl"], 1.0)
    _lines(axes, own, lambda rung: rung.cast["kl"]["mean"])
    axes.set_yscale("log")
    if floor:
        axes.axhline(floor, color="#999999", linewidth=3)
        axes.annotate("BF16, weights moved by 1e-6", (0.02, floor), (0, 6), fontsize=11,
                      xycoords=("axes fraction", "data"), textcoords="offset points",
                      color="#555555")  # fmt: skip
    axes.set_ylabel("KL of the cast\n(nats per token)")
    axes.set_title("What rounding does to trained weights", loc="left", fontsize=13)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.tick_params(labelbottom=False)


def _training(axes: Axes, points: list["Rung"], controls: list["Rung"]) -> None:
    _band(axes.axhspan, controls)
    axes.axhline(0, color="black", linewidth=1)
    for rung in points:
        _point(axes, rung, rung.row, MILLI)
    _lines(axes, points, lambda rung: rung.row["mean"] * MILLI)
    axes.set_ylabel("gap in loss to BF16\n(thousandths of a nat)")
    axes.set_xlabel("stored bits per value")
    axes.set_title("What 20 steps of training in it cost", loc="left", fontsize=13)
    names = [f"{family}\n{bits:g}" for family, bits in zip(FAMILIES, PLACES, strict=True)]
    axes.set_xticks([*PLACES.values()], names)
    axes.set_xlim(-0.5, 4.5)
    _legend(axes, bool(controls))


def _point(axes: Axes, rung: "Rung", found: dict[str, Any], scale: float) -> None:
    color = INTEGER if rung.is_integer else FLOAT
    x, is_other = _place(rung), _is_other(rung)
    if found.get("low") is not None:
        low, high = (max(found[name] * scale, -1e9) for name in ("low", "high"))
        axes.vlines(x, low, high, color=color, linewidth=2, alpha=0.8)
    axes.plot(
        x, found["mean"] * scale, marker="D" if is_other else "s" if _is_nv(rung) else "o",
        markersize=8, color=color, markerfacecolor="white" if rung.is_rotated else color,
        markeredgewidth=2, linestyle="none", zorder=3,
    )  # fmt: skip
    if is_other:
        name = rung.label.rpartition("_")[2].upper()
        axes.annotate(name, (x, found["mean"] * scale), (7, -4), textcoords="offset points",
                      fontsize=10, color=color)  # fmt: skip


def _place(rung: "Rung") -> float:
    aside = ASIDE * (2 if rung.is_rotated or _is_other(rung) else 1)
    return PLACES[rung.bits] + (-aside if rung.is_integer else aside)


def _is_other(rung: "Rung") -> bool:
    """A float of the same width with more exponent bits."""
    return rung.label.endswith(("e5m2", "e3m2"))


def _is_nv(rung: "Rung") -> bool:
    return rung.label.startswith("nv")


def _lines(axes: Axes, points: list["Rung"], value: Any) -> None:
    """MX formats of one kind of element are joined."""
    for is_integer, color in ((True, INTEGER), (False, FLOAT)):
        own = [
            rung for rung in points
            if rung.is_integer == is_integer and not rung.is_rotated and not _is_nv(rung)
            and not _is_other(rung)
        ]  # fmt: skip
        own.sort(key=lambda rung: rung.bits)
        axes.plot([_place(rung) for rung in own], [value(rung) for rung in own], color=color,
                  linewidth=2, zorder=2)  # fmt: skip


def _band(span: Any, controls: list["Rung"]) -> None:
    bounds = [rung.row[name] for rung in controls for name in ("low", "high")]
    bounds = [bound * MILLI for bound in bounds if bound is not None]
    if bounds:
        span(min(bounds), max(bounds), color="#BBBBBB", alpha=0.6, linewidth=0)


def _legend(axes: Axes, has_controls: bool) -> None:
    def mark(**style: Any) -> Any:
        return matplotlib.lines.Line2D([], [], linestyle="none", markersize=8, **style)

    entries = [
        (matplotlib.lines.Line2D([], [], color=INTEGER, linewidth=3), "integers"),
        (matplotlib.lines.Line2D([], [], color=FLOAT, linewidth=3), "floats"),
        (mark(marker="o", color=PLAIN), "MX"),
        (mark(marker="s", color=PLAIN), "NV"),
        (mark(marker="o", color=PLAIN, markerfacecolor="white", markeredgewidth=2), "rotated"),
        (matplotlib.patches.Patch(color="#BBBBBB"), "controls"),
    ]
    entries = entries if has_controls else entries[:-1]
    axes.legend(*zip(*entries, strict=True), ncols=2, frameon=False, fontsize=11, loc="best")


def _steps(axes: Axes, rungs: list["Rung"], controls: list["Rung"]) -> None:
    """Plain NVFP4 and what is added to it, from top to bottom."""
    _band(axes.axvspan, controls)
    axes.axvline(0, color="black", linewidth=1)
    for place, rung in enumerate(rungs):
        row = rung.row
        if row["low"] is not None:
            axes.hlines(-place, row["low"] * MILLI, row["high"] * MILLI, color=FLOAT, linewidth=2)
        axes.plot(row["mean"] * MILLI, -place, "s", color=FLOAT, markersize=8)
    names = {"nvfp4_plain": "plain", "nvfp4": "all of them"}
    labels = [
        names.get(rung.label, "+ " + rung.label.removeprefix("nvfp4_").replace("_", " "))
        for rung in rungs
    ]
    axes.set_yticks([-place for place in range(len(rungs))], labels)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(0.6 - len(rungs), 0.6)
    axes.locator_params(axis="x", nbins=4)
    axes.set_xlabel("gap in loss to BF16\n(thousandths of a nat)")
    axes.set_title("NVFP4, step by step", loc="left", fontsize=13)
