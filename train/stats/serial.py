"""The error of a mean over windows of text, which are not independent.

Windows of one document resemble each other. With many documents their sums are the units
(clustered, Liang and Zeger 1986); with few, neighbours' covariances count (Newey and West 1987),
over a fifth of the text, so that two halves which disagree are seen. The bandwidth being a fixed
share b of the sample, the estimate is too small by 1 - b + b²/3 and has 1.5 / b degrees of freedom
(Kiefer and Vogelsang 2005): both are allowed for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from train.stats.intervals import Array, Estimate, Part

MIN_DOCUMENTS = 20  # effective ones: fewer hardly know their spread
BANDWIDTH = 0.2  # of the windows
MIN_WINDOWS = 10


@dataclass(frozen=True)
class WindowMean:
    estimate: Estimate
    part: Part | None  #: None: too few windows
    by: str  #: what the units were


def window_mean(values: Sequence[float] | Array, documents: Sequence[int]) -> WindowMean:
    """Mean over windows in the order of the text, each beginning in a document of this number."""
    x = np.asarray(values, dtype=np.float64)
    n, mean = len(x), float(np.mean(x))
    if n < MIN_WINDOWS:
        few = Estimate(n, mean, why=f"{n} windows: no verdict")
        return WindowMean(few, None, "nothing")
    _, index, sizes = np.unique(documents, return_inverse=True, return_counts=True)
    effective = n**2 / float((sizes**2).sum())
    if effective >= MIN_DOCUMENTS:
        part, by = clustered(x - mean, index, effective), f"{len(sizes)} documents"
    else:
        part, by = newey_west(x - mean), f"{n} windows, Newey-West"
    return WindowMean(Estimate.of(n, mean, [part]), part, by)


def clustered(residuals: Array, index: np.ndarray, effective: float) -> Part:
    """Variance of the mean from the sums of clusters; `effective`: n² over the sum of squares."""
    sums = np.bincount(index, residuals)
    count = len(sums)
    variance = float((sums**2).sum()) / len(residuals) ** 2 * count / (count - 1)
    return Part(variance, effective - 1)


def newey_west(residuals: Array, bandwidth: float = BANDWIDTH) -> Part:
    """Variance of the mean of a series by Bartlett's weights over `bandwidth` of its length."""
    n = len(residuals)
    lags = max(1, round(bandwidth * n))
    total = float(residuals @ residuals)
    for lag in range(1, lags):
        total += 2 * (1 - lag / lags) * float(residuals[lag:] @ residuals[:-lag])
    share = lags / n
    return Part(max(total, 0.0) / n**2 / (1 - share + share**2 / 3), 1.5 / share)


def shared_part(gaps: Array, documents: Sequence[int]) -> Part | None:
    """The error that all units have in common, evaluated on the same windows: [units, windows].

    From each window's mean over the units; what of it is the units' own noise is taken off.
    """
    found = window_mean(gaps.mean(axis=0), documents)
    if found.part is None:
        return None
    units, windows = gaps.shape
    own = 0.0
    if units > 1:
        rest = gaps - gaps.mean(axis=0) - gaps.mean(axis=1, keepdims=True) + gaps.mean()
        own = float((rest**2).sum()) / ((units - 1) * (windows - 1)) / (units * windows)
    return Part(max(found.part.variance - own, 0.0), found.part.freedom)
