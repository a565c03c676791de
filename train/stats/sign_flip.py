"""The sign-flip test of a mean: exact whatever the noise's shape, if it is symmetric."""

import numpy as np

from train.stats.intervals import Array

MIN_FLIPPED = 6  # below, no p-value can reach 0.05
EXACT = 16  # units up to which all 2^n signs are taken
DRAWS = 1 << 16


def sign_flip_p(gaps: Array) -> float | None:
    """The share of signs whose |mean| is at least the one found; None for too few units."""
    n = len(gaps)
    if n < MIN_FLIPPED:
        return None
    if n <= EXACT:
        signs = 1 - 2 * ((np.arange(1 << n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = 1 - 2 * np.random.default_rng(n).integers(0, 2, (DRAWS, n))
    sums, found = np.abs(signs @ gaps), abs(float(np.sum(gaps)))
    reached = int((sums >= found * (1 - 1e-12)).sum())
    return reached / len(signs) if n <= EXACT else (reached + 1) / (len(signs) + 1)
