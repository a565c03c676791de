"""The 1/B test of Quartet II (arXiv 2601.22813) on a model's own layers.

Does the mean of B quantized gradients near the unquantized one as 1/B, or stop at a bias?
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor, nn

from lowbit import BlockFormat, QuantRecipe, Rounding
from lowbit.measure.unbiasedness import GradientErrors, gradient_errors
from train.analysis.operands import backward_pass
from train.microscope.layers import chosen_linears
from train.output.figures import COLORS, save
from train.subjects.text import Text

UNBIASED = -0.9  # slope of log error over log B: -1 but for chance, 0 for a bias
GRADIENTS = ("grad_input", "grad_weight")
Rows = list[dict[str, Any]]


def unbiasedness(
    model: nn.Module,
    text: Text,
    formats: Sequence[BlockFormat],
    patterns: Sequence[str],
    draws: int,
) -> Rows:
    """One row a layer, format, rounding, gradient and B = 1, 2, 4 .. `draws`: |mean - g|² / |g|².

    All four operands of dgrad and wgrad are rounded, to nearest (one draw says it all) or
    stochastically; `g` is the layer's gradient from the same input and grad_output, unquantized.
    """
    rows: Rows = []
    handles = []

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def on_forward(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            assert isinstance(layer, nn.Linear)
            x, weight = inputs[0].detach(), layer.weight

            def on_gradient(gradient: Tensor) -> None:
                for format in formats:
                    for rounding in (Rounding.NEAREST, Rounding.STOCHASTIC):
                        found = gradient_errors(
                            QuantRecipe.uniform(replace(format, rounding=rounding)),
                            *(x.flatten(0, -2), weight, gradient.flatten(0, -2)),
                            draws=draws if rounding is Rounding.STOCHASTIC else 1,
                            exact=True,
                        )
                        rows.extend(_rows(name, format, rounding, found))

            output.register_hook(on_gradient)  # type: ignore[no-untyped-call]  # torch's

        return on_forward

    for name, layer in chosen_linears(model, patterns).items():
        handles.append(layer.register_forward_hook(watch(name)))
    try:
        backward_pass(model, text)
    finally:
        for handle in handles:
            handle.remove()
    return rows


def _rows(name: str, format: BlockFormat, rounding: Rounding, found: GradientErrors) -> Rows:
    return [
        {"layer": name, "format": str(format), "rounding": rounding.value, "gradient": gradient,
         "B": count, "error": error}
        for gradient in GRADIENTS
        for count, error in zip(found.draws, getattr(found, gradient), strict=True)
    ]  # fmt: skip


def verdicts(rows: Rows) -> Rows:
    """One row a format, rounding and gradient: means over layers, the slope, what it says."""
    table = []
    for (format, rounding, gradient), own in _grouped(rows).items():
        counts = sorted({row["B"] for row in own})
        means = [float(np.mean([r["error"] for r in own if r["B"] == count])) for count in counts]
        slope = np.log(means[-1] / means[0]) / np.log(counts[-1]) if len(counts) > 1 else 0.0
        table.append(
            {
                "format": format, "rounding": rounding, "gradient": gradient,
                "error at B=1": means[0], f"at B={max(r['B'] for r in rows)}": means[-1],
                "slope": round(float(slope), 3),
                "verdict": "unbiased" if slope < UNBIASED else "biased",
            }
        )  # fmt: skip
    return table


def plot_unbiasedness(rows: Rows, out: Path) -> Path:
    """Mean error over layers against B, one panel a gradient."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    for axes, gradient in zip(figure.subplots(1, 2, sharey=True), GRADIENTS, strict=True):
        formats = list(dict.fromkeys(row["format"] for row in rows))
        last = max(row["B"] for row in rows)
        for (format, rounding, which), own in _grouped(rows).items():
            if which != gradient:
                continue
            counts = sorted({row["B"] for row in own})
            means = [np.mean([r["error"] for r in own if r["B"] == count]) for count in counts]
            color = COLORS[1 + formats.index(format) % (len(COLORS) - 1)]
            if rounding == "nearest":  # every draw is the same: a level
                axes.plot([1, last], means * 2, "--", color=color, label=f"{format}, nearest")
            else:
                label = f"{format}, stochastic"
                axes.plot(counts, means, "o-", color=color, markersize=4, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(gradient, fontsize=11)
        axes.set_xlabel("B, draws averaged")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("|mean of B draws - g|² / |g|², mean over layers")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    save(figure, out / "unbiasedness")
    return out / "unbiasedness.png"


def _grouped(rows: Rows) -> dict[tuple[str, str, str], Rows]:
    groups: dict[tuple[str, str, str], Rows] = {}
    for row in rows:
        groups.setdefault((row["format"], row["rounding"], row["gradient"]), []).append(row)
    return groups
