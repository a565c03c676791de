"""Bounds for CI: a largest gap, and bitwise equality with a baseline or with golden curves."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from train.runs.run import Run

EQUAL_COLUMNS = ("step", "tokens_seen", "train/loss", "grad_norm", "lr", "val/loss")


def over_bound(result: dict[str, Any], bound: float) -> Iterable[str]:
    if not math.isfinite(bound):
        raise ValueError(f"--max-gap {bound} bounds nothing: give a finite number")
    for pair in (pair for pair in result["pairs"] if pair["a"] == result["baseline"]):
        if "diverged" in pair["verdict"]:
            yield f"--max-gap {bound}: {pair['verdict']}"
        elif pair["mean"] is None:
            raise ValueError(f"--max-gap {bound}: {pair['b']} has no gap ({pair['verdict']})")
        elif pair["mean"] > bound:
            yield f"--max-gap {bound}: {pair['b']} is {pair['mean']:+.5f} above {pair['a']}"


def unequal(runs: Sequence[Run], golden: Sequence[Run] = ()) -> Iterable[str]:
    """The first difference of each run from the golden run of its name, or else from the baseline
    run of its seed.
    """
    own = runs[len(golden) :]  # the golden ones come first
    for one, other in _of_one_name(own, golden) if golden else _of_one_seed(runs):
        if difference := _first_difference(one, other):
            yield f"--assert-equal: {other.path} against {one.path}: {difference}"


def _of_one_name(runs: Sequence[Run], golden: Sequence[Run]) -> Iterable[tuple[Run, Run]]:
    own = {one.path.resolve().name: one for one in runs}
    for one in golden:
        if one.path.name not in own:
            raise ValueError(f"--assert-equal: no run {one.path.name} beside {one.path}")
        yield one, own[one.path.name]


def _of_one_seed(runs: Sequence[Run]) -> Iterable[tuple[Run, Run]]:
    baseline = {one.seed: one for one in runs if one.label == runs[0].label}
    for one in (one for one in runs if one.label != runs[0].label):
        if one.seed not in baseline:
            raise ValueError(f"--assert-equal: no {runs[0].label} run of seed {one.seed}")
        yield baseline[one.seed], one


def _first_difference(a: Run, b: Run) -> str | None:
    if len(a.metrics["step"]) != len(b.metrics["step"]):
        return f"{len(b.metrics['step'])} steps, not {len(a.metrics['step'])}"
    for column in EQUAL_COLUMNS:
        if (column in a.metrics) != (column in b.metrics):
            return f"{column} is in one of them only"
        if column in a.metrics:
            x, y = a.metrics[column], b.metrics[column]
            for i in np.flatnonzero((x != y) & ~(np.isnan(x) & np.isnan(y)))[:1]:
                step = int(a.metrics["step"][i])
                return f"{column} at step {step} is {float(y[i])!r}, not {float(x[i])!r}"
    return None
