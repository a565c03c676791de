"""The spike rule: when a step's loss stands out from those before it.

A spike is more than DEVIATIONS standard deviations, and MARGIN, above the mean of the last WINDOW
losses, of which there must be MIN_STEPS.
"""

import statistics
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

WINDOW = 50
MIN_STEPS = 20
DEVIATIONS = 6.0
MARGIN = 0.1  # nats

Array = NDArray[np.float64]


def _reach(deviation: Array | float) -> Array:
    return np.maximum(DEVIATIONS * np.asarray(deviation), MARGIN)


def mean_before_spike(loss: float, before: Sequence[float]) -> float | None:
    """The mean that `loss` stands out from; None where it does not. `before`: the losses so far."""
    if len(before) < MIN_STEPS:
        return None
    last = list(before)[-WINDOW:]
    mean = statistics.fmean(last)
    return mean if loss > mean + _reach(statistics.stdev(last)) else None


def count_spikes(losses: Array) -> int:
    """How many of `losses`, in the order of their steps, are spikes."""
    ends = np.arange(MIN_STEPS, len(losses))
    if not len(ends):
        return 0
    centred = losses - losses.mean()  # or the squares lose digits
    sums, squares = (np.concatenate([[0.0], np.cumsum(x)]) for x in (centred, centred**2))
    starts = np.maximum(ends - WINDOW, 0)
    n = ends - starts
    mean = (sums[ends] - sums[starts]) / n
    variance = np.maximum(squares[ends] - squares[starts] - n * mean**2, 0) / (n - 1)
    return int((centred[ends] > mean + _reach(np.sqrt(variance))).sum())
