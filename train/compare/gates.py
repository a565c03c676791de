"""Bounds for CI: a largest gap, and bitwise equality with a baseline or with golden curves."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from train.runs.metrics import Array, is_empty
from train.runs.run import Run
from train.stats.intervals import MIN_UNITS, NO_SPREAD, NO_VERDICT

TIMES = ("tokens_per_second",)  # all other columns are a function of the run


def over_bound(result: dict[str, Any], bound: float) -> Iterable[str]:
    """Recipes not shown to cost at most `bound`: the upper end of each 95 % interval must lie
    within it, of full runs and of branches; controls are no recipes. Every run of a recipe has
    finished and has a partner.
    """
    if not math.isfinite(bound):
        raise ValueError(f"--max-gap {bound} bounds nothing: give a finite number")
    controls = {row["label"] for row in result["runs"] if row["control"]}
    for pair in (pair for pair in result["pairs"] if pair["a"] == result["baseline"]):
        if pair["b"] not in controls:
            yield from _over(f"--max-gap {bound}: {pair['b']}", pair, bound)
            for why in _incomplete(pair, result["runs"]):
                yield f"--max-gap {bound}: {why}"
    for found in result["branches"]:
        for row in (row for row in found["rows"] if not row["control"]):
            where = f"branches of {found['horizon']} steps in {found['path']}"
            yield from _over(f"--max-gap {bound}: {row['label']}, {where},", row, bound)


def _incomplete(pair: dict[str, Any], runs: Sequence[dict[str, Any]]) -> Iterable[str]:
    """Runs of the pair that its interval leaves out, or that may yet change it."""
    seeds = {row["seed"] for row in runs if row["label"] == pair["a"]}
    for row in (row for row in runs if row["label"] in (pair["a"], pair["b"])):
        run = f"{row['label']} seed {row['seed']}"
        if row["status"] not in ("finished", "diverged"):  # these have their own sentence
            yield f"{run} {'failed' if row['status'] == 'failed' else 'has not finished'}"
        if row["seed"] not in seeds:
            yield f"{run} has no {pair['a']} run beside it"


def _over(what: str, row: dict[str, Any], bound: float) -> Iterable[str]:
    if row["verdict"] == NO_VERDICT and abs(row["mean"]) < NO_SPREAD:
        return  # no gap at all: the same numbers
    if row["high"] is None or "no verdict" in row["verdict"]:
        yield f"{what} has no upper limit, which takes {MIN_UNITS} units: {row['verdict']}"
    elif row["high"] > bound:
        low, high = f"{row['low']:+.5f}", f"{row['high']:+.5f}"
        yield f"{what} may cost {high}: gap {row['mean']:+.5f} ({low} to {high})"


def unequal(runs: Sequence[Run], golden: Sequence[Run] = ()) -> Iterable[str]:
    """The first difference of each run from the golden run of its name, or else from the baseline
    run of its seed; on both sides every run has its partner.
    """
    own = runs[len(golden) :]  # the golden ones come first
    for one, other in _of_one_name(own, golden) if golden else _of_one_seed(runs):
        if difference := _first_difference(one, other):
            yield f"--assert-equal: {other.path} against {one.path}: {difference}"


def _of_one_name(runs: Sequence[Run], golden: Sequence[Run]) -> Iterable[tuple[Run, Run]]:
    ours, theirs = _by_name(runs), _by_name(golden)
    for name in [*theirs, *ours]:
        if name not in ours:
            raise ValueError(f"--assert-equal: no run {name} beside {theirs[name].path}")
        if name not in theirs:
            raise ValueError(f"--assert-equal: {ours[name].path} has no golden run of its name")
    return [(theirs[name], ours[name]) for name in theirs]


def _by_name(runs: Sequence[Run]) -> dict[str, Run]:
    found: dict[str, Run] = {}
    for one in runs:
        first = found.setdefault(one.path.resolve().name, one)
        if first is not one:
            raise ValueError(f"--assert-equal: {first.path} and {one.path} have one name")
    return found


def _of_one_seed(runs: Sequence[Run]) -> Iterable[tuple[Run, Run]]:
    baseline = {one.seed: one for one in runs if one.label == runs[0].label}
    others = [one for one in runs if one.label != runs[0].label]
    for one in others:
        if one.seed not in baseline:
            raise ValueError(f"--assert-equal: no {runs[0].label} run of seed {one.seed}")
    for seed in baseline.keys() - {one.seed for one in others}:
        raise ValueError(f"--assert-equal: {baseline[seed].path} has no run of seed {seed} beside")
    return [(baseline[one.seed], one) for one in others]


def _first_difference(a: Run, b: Run) -> str | None:
    """Bit for bit: -0.0 is not 0.0, NaN no empty cell."""
    if "failed" in (a.status, b.status) or a.status != b.status:
        return f"status is {b.status}, not {a.status}" if a.status != b.status else "both failed"
    if len(a.metrics["step"]) != len(b.metrics["step"]):
        return f"{len(b.metrics['step'])} steps, not {len(a.metrics['step'])}"
    only = a.info.get("golden_columns")  # an old file does not hold all
    columns = [c for c in {**a.metrics, **b.metrics} if c not in TIMES and (not only or c in only)]
    for column in columns:
        if (column in a.metrics) != (column in b.metrics):
            return f"{column} is in one of them only"
        x, y = a.metrics[column], b.metrics[column]
        differs = np.ascontiguousarray(x).view(np.int64) != np.ascontiguousarray(y).view(np.int64)
        alike = np.isnan(x) & np.isnan(y) if only else is_empty(x) & is_empty(y)
        for i in np.flatnonzero(differs & ~alike)[:1]:
            step = int(a.metrics["step"][i])
            return f"{column} at step {step} is {_cell(y[i : i + 1])}, not {_cell(x[i : i + 1])}"
    return None


def _cell(value: Array) -> str:
    return "empty" if is_empty(value)[0] else repr(float(value[0]))
