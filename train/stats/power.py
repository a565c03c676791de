"""What a comparison could have seen: detectable effects, equivalence, and its power."""

from functools import lru_cache
from math import sqrt
from statistics import NormalDist

import numpy as np

from train.stats.intervals import Array, Estimate, t_quantile

POWER = 0.8
ONE_SIDED = 0.95  # of each of the two one-sided tests
_cdf = np.vectorize(NormalDist().cdf)


@lru_cache
def _spreads(freedom: float, points: int = 801) -> tuple[Array, Array]:
    """Values of the estimated over the true standard error, √(χ²/ν), and their weights."""
    reach = 8 / sqrt(2 * freedom)
    s = np.linspace(max(1e-6, 1 - reach), 1 + reach, points)
    log_density = (freedom - 1) * np.log(s) - freedom * s**2 / 2
    weights = np.exp(log_density - log_density.max())
    return s, weights / weights.sum()


def power(effect: float, freedom: float, critical: float) -> float:
    """Of |t| > `critical` when the truth lies `effect` standard errors from zero."""
    s, weights = _spreads(freedom)
    return float(weights @ (_cdf(effect - critical * s) + _cdf(-effect - critical * s)))


@lru_cache(maxsize=1024)
def detectable(freedom: float, critical: float, wanted: float = POWER) -> float:
    """The effect, in standard errors, that is found with probability `wanted`."""
    low, high = 0.0, 2 * critical + 10
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle, freedom, critical) < wanted else (low, middle)
    return high


def equivalent(found: Estimate, margin: float) -> bool:
    """Two one-sided 5 % tests: the 90 % interval lies within ± `margin` (Schuirmann 1987)."""
    if found.standard_error is None:
        return False
    low, high = found.between(ONE_SIDED)
    return -margin < low and high < margin


def equivalence_power(found: Estimate, margin: float) -> float | None:
    """The probability of `equivalent` if there is no gap at all and the spread is this one."""
    if not found.standard_error or found.freedom is None:
        return None
    s, weights = _spreads(found.freedom)
    reach = margin / found.standard_error - t_quantile(ONE_SIDED, found.freedom) * s
    return float(weights @ np.maximum(2 * _cdf(reach) - 1, 0))
