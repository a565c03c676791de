"""Mean gaps over units of several strata: each stratum's own spread, and what all units share."""

import math
from collections.abc import Sequence

import numpy as np

from train.stats.intervals import MIN_UNITS, Estimate, Part

Strata = Sequence[Sequence[float]]


def estimate(strata: Strata, shared: Sequence[Part] = (), first: int | None = None) -> Estimate:
    """Mean over the strata's means. Strata (checkpoints) are given: units within them are noise.

    Every stratum has a spread of its own (Welch); `shared` are errors that all units have in
    common. `first`: the spread comes from so many units of each stratum alone, since the others'
    number was chosen by it (Stein's two stages).
    """
    found = [np.array(gaps) for gaps in strata if len(gaps)]
    n = sum(len(gaps) for gaps in found)
    if not found:
        return Estimate(0, None, why="no units: no verdict")
    mean = float(np.mean([gaps.mean() for gaps in found]))
    fewest = min(len(gaps) for gaps in found)
    if fewest < 2 or n < MIN_UNITS:
        return Estimate(n, mean, why=f"{_count(n)}: no verdict" if n < MIN_UNITS else _FEW)
    spreads = [gaps[:first] for gaps in found]
    parts = [
        Part(float(spread.var(ddof=1)) / len(gaps) / len(found) ** 2, len(spread) - 1)
        for spread, gaps in zip(spreads, found, strict=True)
    ]
    return Estimate.of(n, mean, [*parts, *shared])


_FEW = "one unit of a checkpoint: no verdict"


def _count(n: int) -> str:
    return "1 unit" if n == 1 else f"{n} units"


def over_strata(means: Sequence[float], shared: Sequence[Part] = ()) -> Estimate:
    """The same mean as a statement about strata like these: they are the units now."""
    if len(means) < MIN_UNITS:
        return Estimate(len(means), float(np.mean(means)) if means else None, why="too few runs")
    spread = Part(float(np.var(means, ddof=1)) / len(means), len(means) - 1)
    return Estimate.of(len(means), float(np.mean(means)), [spread, *shared])


def units_needed(first: Sequence[Strata], target: float) -> int:
    """Stein's second stage: how many units each stratum takes in all for a standard error of
    `target`, from the spread of the first stage; of several recipes, the largest number.
    """
    wanted = 0
    for strata in first:
        variances = [float(np.var(gaps, ddof=1)) for gaps in strata if len(gaps) > 1]
        of_one = sum(variances) / len(variances) ** 2 if variances else 0.0
        wanted = max(wanted, math.ceil(of_one / target**2))
    return wanted
