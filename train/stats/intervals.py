"""Student's t, intervals of means, and what a verdict is made of: nothing else decides one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
MIN_UNITS = 3  # fewer say too little about their spread
NO_SPREAD = 1e-12  # nats: a standard deviation below it is rounding, not noise
NO_VERDICT = "no spread: no verdict"

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean and its bounds, at one point or at several."""

    mean: Array
    standard_error: Array
    low: Array
    high: Array


def t_cdf(t: float, df: float) -> float:
    """P(T <= t) for df > 0 degrees of freedom, by the incomplete beta function."""
    tail = 0.5 * _beta(df / (df + t * t), df / 2, 0.5)
    return 1 - tail if t > 0 else tail


def _beta(x: float, a: float, b: float) -> float:
    """Regularised incomplete beta function I_x(a, b): DLMF 8.17.22, evaluated by Lentz's method."""
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly
        return 1 - _beta(1 - x, b, a)
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        before = fraction
        for term in (even, odd):
            d, c = 1 / (1 + term * d), 1 + term / c
            fraction *= c * d
        if abs(fraction - before) < 1e-16 * abs(fraction):
            break
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return math.exp(scale + a * math.log(x) + b * math.log1p(-x)) * fraction / a


@lru_cache(maxsize=4096)
def t_quantile(p: float, df: float) -> float:
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


@dataclass(frozen=True)
class Part:
    """One source of a mean's error: its variance, and how many degrees of freedom tell it."""

    variance: float
    freedom: float


@dataclass(frozen=True)
class Estimate:
    """A mean over `units`, its standard error and 95 % interval; `why` there is none."""

    units: int
    mean: float | None
    standard_error: float | None = None
    freedom: float | None = None
    low: float | None = None
    high: float | None = None
    why: str | None = None

    @classmethod
    def of(cls, units: int, mean: float, parts: Sequence[Part]) -> "Estimate":
        """From independent sources of error; their degrees of freedom by Welch and Satterthwaite.

        Without spread there is no noise to judge by, and no interval.
        """
        variance = sum(part.variance for part in parts)
        if math.sqrt(variance * units) < NO_SPREAD:
            return cls(units, mean, math.sqrt(variance), why=NO_VERDICT)
        freedom = variance**2 / sum(p.variance**2 / p.freedom for p in parts if p.variance)
        found = cls(units, mean, math.sqrt(variance), freedom)
        low, high = found.between((1 + CONFIDENCE) / 2)
        return cls(units, mean, found.standard_error, freedom, low, high)

    def between(self, p: float) -> tuple[float, float]:
        """The interval whose upper end lies above the truth with probability `p`."""
        assert self.mean is not None and self.standard_error is not None
        if self.freedom is None:
            return self.mean, self.mean
        reach = t_quantile(p, self.freedom) * self.standard_error
        return self.mean - reach, self.mean + reach

    @property
    def p(self) -> float | None:
        """Of the two-sided t test against no gap."""
        if not self.standard_error or self.freedom is None or self.mean is None:
            return None
        return 2 * (1 - t_cdf(abs(self.mean) / self.standard_error, self.freedom))

    @property
    def verdict(self) -> str:
        return self.why or verdict_of(self.low, self.high)


def verdict_of(low: float | None, high: float | None) -> str:
    """Of an interval of a gap in loss."""
    assert low is not None and high is not None
    return "worse" if low > 0 else "better" if high < 0 else "not distinguishable"
