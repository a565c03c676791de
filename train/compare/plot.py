"""compare.png and compare.svg: the curves, the gaps to the baseline, and what branches say."""

import textwrap
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train.output.figures import COLORS, save

MARKERS = "osD^vphd"
CONTROL = "#999999"
GAP_FROM = 0.25  # share of the tokens after which the gap panel must show everything


def plot(document: dict[str, Any], out: Path) -> None:
    """Draw what compare.json holds, nothing else."""
    branches = [(found, row) for found in document["branches"] for row in found["rows"]]
    inches = 0.9 + 0.32 * len(branches) if branches else 0.0
    figure = Figure(figsize=(8, 7 + inches), layout="constrained")
    ratios = (4.2, 2.8, inches)[: 3 if branches else 2]
    top, bottom, *rest = figure.subplots(len(ratios), 1, height_ratios=ratios)
    bottom.sharex(top)
    last = max((row["tokens"] for row in document["runs"]), default=0) or 1
    unit, name = (1e9, "billion") if last >= 2e9 else (1e6, "million")
    bottom.axhline(0, color="black", linewidth=1)
    styles = _styles(document["runs"])
    summed_up = {band["label"] for band in document["bands"]}
    for row, curves in zip(document["runs"], document["curves"], strict=True):
        faint = {"marker": ".", "markersize": 4} if row["label"] in summed_up else {}
        _draw_run(top, bottom, row, curves, styles[row["label"]] | faint, unit)
    for band in document["bands"]:
        color = styles[band["label"]]["color"]
        at = [tokens / unit for tokens in band["tokens"]]
        bottom.fill_between(at, band["low"], band["high"], color=color, alpha=0.1, linewidth=0)
        for edge in ("low", "high"):  # fills of several recipes mix, their edges do not
            bottom.plot(at, band[edge], color=color, linewidth=1.2, linestyle="--")
        bottom.plot(at, band["mean"], linewidth=2.2, **styles[band["label"]])
    _fit(bottom, document, last)
    top.set_xlim(0, 1.02 * last / unit)
    top.tick_params(labelbottom=False)
    top.set_ylabel("loss (nats per token)", fontsize=12)
    bottom.set_ylabel(f"gap to {document['baseline']}\n(nats per token)", fontsize=12)
    bottom.set_xlabel(f"training tokens ({name})", fontsize=12)
    for label, style in styles.items():
        top.plot([], [], linewidth=1.6, label=_legend(label, document["runs"]), **style)
    top.legend(fontsize=11, frameon=False, loc="upper right")
    top.set_title(_caption(document), fontsize=10, loc="left")
    for axes in rest:
        _draw_branches(axes, branches, document["baseline"], styles)
    for axes in (top, bottom, *rest):
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.tick_params(axis="x" if axes in rest else "both", labelsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, out / "compare")


def _draw_branches(
    axes: Axes, branches: list[Any], baseline: str, styles: dict[str, dict[str, Any]]
) -> None:
    """Mean gap and 95 % interval of each arm, from top to bottom."""
    axes.axvline(0, color="black", linewidth=1)
    for place, (_, row) in enumerate(branches):
        style = styles.get(row["label"], {"color": CONTROL, "marker": "o"}) | {"markersize": 7}
        if row["mean"] is not None and row["low"] is not None:
            error = row["high"] - row["mean"]
            axes.errorbar(row["mean"], -place, xerr=error, capsize=4, linewidth=1.6, **style)
        elif row["mean"] is not None:
            axes.plot([row["mean"]], [-place], linestyle="none", **style)
    places = [-place for place in range(len(branches))]
    axes.set_yticks(places, _branch_names(branches))
    axes.tick_params(axis="y", labelsize=9)
    axes.set_ylim(0.6 - len(branches), 0.6)
    axes.ticklabel_format(axis="x", style="plain")
    axes.locator_params(axis="x", nbins=5)
    what = f"branches of H steps: mean gap to {baseline},\n95 % interval, these checkpoints"
    axes.set_xlabel(what, fontsize=12)


def _branch_names(branches: list[Any]) -> list[str]:
    """An arm and its horizon; the folder where two sets have one horizon."""
    sets = {found["path"]: found["horizon"] for found, _ in branches}
    twice = [horizon for horizon in sets.values() if list(sets.values()).count(horizon) > 1]
    return [
        f"{row['label']}, H = {found['horizon']}"
        + (f", {row['diverged']} diverged" if row["diverged"] else "")
        + (", no interval" if row["low"] is None else "")
        + (f"\n{Path(found['path']).name}" if found["horizon"] in twice else "")
        for found, row in branches
    ]


def _styles(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By label; controls are grey and use up no colour. Hollow markers let others show through."""
    controls = list(dict.fromkeys(row["label"] for row in rows if row["control"]))
    labels = list(dict.fromkeys(row["label"] for row in rows if not row["control"]))
    found = {}
    for label in dict.fromkeys(row["label"] for row in rows):
        i = (controls if label in controls else labels).index(label)
        color = CONTROL if label in controls else COLORS[i % len(COLORS)]
        found[label] = {"color": color, "marker": MARKERS[i % 8], "markersize": 5 + 1.5 * (i % 4)}
        found[label] |= {"markerfacecolor": "none", "markeredgewidth": 1.4}
    return found


def _draw_run(
    top: Axes, bottom: Axes, row: dict[str, Any], curves: Any, style: dict[str, Any], unit: float
) -> None:
    points = {k: ([t / unit for t in c["tokens"]], c["values"]) for k, c in curves.items()}
    line = {"color": style["color"], "linewidth": 1, "alpha": 0.45}
    top.plot(*points["train"], **line)
    top.plot(*points["val"], linestyle="none", **style)
    if "val_gap" in points:
        bottom.plot(*points["train_gap"], **line)
        bottom.plot(*points["val_gap"], linestyle="none", **style)
    if row["status"] == "diverged" and points["train"][0]:
        end = [values[-1:] for values in points["train"]]
        top.plot(*end, "x", color=style["color"], markersize=12, markeredgewidth=3)


def _legend(label: str, rows: list[dict[str, Any]]) -> str:
    own = [row for row in rows if row["label"] == label]
    stopped = [row["status"] for row in own if row["status"] in ("diverged", "failed")]
    counts = [f"{stopped.count(word)} of {len(own)} {word}" for word in dict.fromkeys(stopped)]
    return f"{label}{' (control)' if own[0]['control'] else ''}{''.join(f', {c}' for c in counts)}"


def _fit(axes: Axes, document: dict[str, Any], last: float) -> None:
    """Early gaps and those of diverged runs are large and say little: others set the range."""
    found = [0.0]
    for row, curves in zip(document["runs"], document["curves"], strict=True):
        for curve in (curves.get("train_gap"), curves.get("val_gap")):
            if curve and row["status"] != "diverged":
                both = zip(curve["tokens"], curve["values"], strict=True)
                found += [gap for tokens, gap in both if tokens >= GAP_FROM * last]
    for band in document["bands"]:
        edges = zip(band["tokens"], band["low"], band["high"], strict=True)
        found += [gap for tokens, *both in edges if tokens >= GAP_FROM * last for gap in both]
    low, high = min(found), max(found)
    margin = 0.08 * (high - low) or 0.01
    axes.set_ylim(low - margin, high + margin)


def _caption(document: dict[str, Any]) -> str:
    text = f"Markers: validation loss. Lines: train loss, EMA {document['smoothing']} per step."
    if document["bands"]:
        text += " Dashed: 95 % interval of the mean gap over seeds, at each point for itself."
    if any(row["status"] == "diverged" for row in document["runs"]):
        text += " ×: diverged."
    beside = [p for p in document["pairs"] if p["a"] == document["baseline"] and p["differs"]]
    for pair in beside[:2]:
        text += f" {pair['b_name']} against {pair['a_name']}: not the recipe alone."
    none = dict.fromkeys(p["verdict"] for p in document["pairs"] if "no verdict" in p["verdict"])
    return textwrap.fill(text + "".join(f" {v[0].upper()}{v[1:]}." for v in none), 84)
