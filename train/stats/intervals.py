"""The Student-t interval of a mean over independent units."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
MIN_UNITS = 3  # fewer say too little about their spread

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    mean: Array
    standard_error: Array
    low: Array
    high: Array


def t_cdf(t: float, df: int) -> float:
    """P(T <= t) for an integer number of degrees of freedom, a finite sum (Abramowitz 26.7.3-4)."""
    theta = math.atan(t / math.sqrt(df))
    term, total = (1.0, 1.0) if df % 2 == 0 else (math.cos(theta), math.cos(theta))
    for k in range(2 + df % 2, df - 1, 2):
        term *= math.cos(theta) ** 2 * (k - 1) / k
        total += term
    if df % 2 == 0:
        return 0.5 + 0.5 * math.sin(theta) * total
    return 0.5 + (theta + (math.sin(theta) * total if df > 1 else 0.0)) / math.pi


def t_quantile(p: float, df: int) -> float:
    """The t that `t_cdf` maps to 0.5 < p < 1."""
    low, high = 0.0, 1.0
    while t_cdf(high, df) < p:
        high *= 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return high


def interval(gaps: Array) -> Interval:
    """Mean over the units (axis 0) and its Student-t interval."""
    n = len(gaps)
    mean, error = gaps.mean(axis=0), gaps.std(axis=0, ddof=1) / math.sqrt(n)
    reach = t_quantile((1 + CONFIDENCE) / 2, n - 1) * error
    return Interval(mean, error, mean - reach, mean + reach)
