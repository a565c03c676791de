"""A run that was copied under another seed's name is no second unit."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from train.runs.run import Run

COLUMNS = ("train/loss", "grad_norm")


def check_copies(runs: Sequence[Run]) -> None:
    """ValueError for two seeds of a label whose curves are the same bits, as far as both go."""
    for a, b in combinations(runs, 2):
        if a.label == b.label and a.seed != b.seed and _same(a, b):
            raise ValueError(
                f"{a.path} and {b.path} are one run under two seeds: their losses are the same"
            )


def _same(a: Run, b: Run) -> bool:
    steps = min(len(a.metrics["step"]), len(b.metrics["step"]))
    columns = [name for name in COLUMNS if name in a.metrics and name in b.metrics]
    pairs = [(a.metrics[name][:steps], b.metrics[name][:steps]) for name in columns]
    return steps > 0 and all(np.array_equal(x, y, equal_nan=True) for x, y in pairs)
