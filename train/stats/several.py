"""Several comparisons at once: quantiles for all of them together, and adjusted p-values."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from train.stats.intervals import CONFIDENCE, t_quantile

DRAWS = 200_000
SEED = 20_251_128  # of the quantile's draws, which are part of the program


def sidak_quantile(comparisons: int, freedom: float, confidence: float = CONFIDENCE) -> float:
    """Of |t| for one of so many, whatever their correlation (Šidák 1967)."""
    return t_quantile((1 + confidence ** (1 / comparisons)) / 2, freedom)


@lru_cache
def dunnett_quantile(comparisons: int, units: int, confidence: float = CONFIDENCE) -> float:
    """Of the largest |t| of `comparisons` recipes against one baseline over the same `units`.

    Dunnett's (1955) comparison with a control, but each t has the spread of its own gaps: recipes
    need not be equally noisy. By drawing, from a fixed seed.
    """
    if comparisons == 1:
        return t_quantile((1 + confidence) / 2, units - 1)
    random = np.random.default_rng(SEED)
    size = max(1, DRAWS // 20)
    largest = np.concatenate([_largest(random, size, comparisons, units) for _ in range(20)])
    return float(np.quantile(largest, confidence))


def _largest(random: np.random.Generator, draws: int, comparisons: int, units: int) -> np.ndarray:
    losses = random.standard_normal((draws, comparisons + 1, units))
    gaps = losses[:, 1:] - losses[:, :1]
    t = gaps.mean(-1) / gaps.std(-1, ddof=1) * units**0.5
    largest: np.ndarray = np.abs(t).max(axis=1)
    return largest


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: those below 0.05 are false together in at most 5 % (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
