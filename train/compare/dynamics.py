"""How a run behaved: tokens to a target, spikes, the trend of the gradient norm."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from train.runs.metrics import Array
from train.runs.run import Run
from train.stats.spikes import count_spikes

TENTH = 0.1


def common_target(runs: Sequence[Run]) -> float | None:
    """The lowest val loss that every run reached which neither failed nor diverged."""
    found = [
        float(run.val_curve[1].min())
        for run in runs
        if run.status not in ("failed", "diverged") and len(run.val_curve[1])
    ]
    return max(found) if found else None


def tokens_to(run: Run, target: float | None) -> float | None:
    """Where the val loss first is at or below `target`, on straight lines between validations."""
    tokens, loss = run.val_curve
    reached = np.flatnonzero(loss <= target) if target is not None else np.empty(0, int)
    if not len(reached):
        return None
    i = int(reached[0])
    if i == 0 or loss[i - 1] == loss[i]:
        return float(tokens[i])
    share = (loss[i - 1] - target) / (loss[i - 1] - loss[i])
    return float(tokens[i - 1] + share * (tokens[i] - tokens[i - 1]))


def norm_trend(norm: Array) -> tuple[float | None, float | None]:
    """Median gradient norm of the last tenth of the steps; that over the median at mid-run."""
    width = int(len(norm) * TENTH)
    if not width:
        return None, None
    last = float(np.median(norm[-width:]))
    middle = float(np.median(norm[len(norm) // 2 - width : len(norm) // 2]))
    return last, last / middle if middle else None


def _met_at_first(run: Run, target: float | None) -> bool:
    """Then it was met before, nobody saw when."""
    loss = run.val_curve[1]
    return bool(target is not None and len(loss) and loss[0] <= target)


def behaviour(run: Run, target: float | None) -> dict[str, Any]:
    """Keys of a row of compare.json."""
    finite = {
        name: column[np.isfinite(column)]
        for name in ("train/loss", "grad_norm")
        if (column := run.metrics.get(name)) is not None
    }
    norm, trend = norm_trend(finite.get("grad_norm", np.empty(0)))
    return {
        "tokens_to_target": tokens_to(run, target),
        "tokens_to_target_at_most": _met_at_first(run, target),
        "spikes": count_spikes(finite["train/loss"]),
        "grad_norm": norm,
        "grad_norm_trend": trend,
    }
