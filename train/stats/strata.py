"""Mean gaps over units of several strata, and how many units a wanted standard error takes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from train.stats.intervals import CONFIDENCE, MIN_UNITS, t_quantile

Strata = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Estimate:
    """Mean over the strata's means; errors from the spread within them. None: too few units."""

    units: int
    mean: float
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def verdict(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.units} units: no verdict"
        return "worse" if self.low > 0 else "better" if self.high < 0 else "not distinguishable"


def estimate(strata: Strata) -> Estimate:
    """Strata (checkpoints) are given, not sampled: only the spread of units within them is noise.

    The variance within is pooled over the strata; Student-t with n - strata degrees of freedom.
    """
    found = [np.array(gaps) for gaps in strata if len(gaps)]
    n = sum(len(gaps) for gaps in found)
    mean = float(np.mean([gaps.mean() for gaps in found])) if found else math.nan
    freedom = n - len(found)
    if n < MIN_UNITS or freedom < 1:
        return Estimate(n, mean)
    variance = sum(((gaps - gaps.mean()) ** 2).sum() for gaps in found) / freedom
    error = math.sqrt(variance * sum(1 / len(gaps) for gaps in found)) / len(found)
    reach = t_quantile((1 + CONFIDENCE) / 2, freedom) * error
    return Estimate(n, mean, error, mean - reach, mean + reach)


def units_needed(found: Estimate, target: float) -> int | None:
    """For a standard error of `target`, if the spread stays what it was; None: not known yet."""
    if found.standard_error is None:
        return None
    return max(MIN_UNITS, math.ceil(found.units * (found.standard_error / target) ** 2))
