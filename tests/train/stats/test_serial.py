"""Errors of means over windows of text that resemble each other."""

import numpy as np
import pytest

from train.stats.serial import clustered, newey_west, shared_part, window_mean
from train.stats.strata import estimate


def autoregressive(rng: np.random.Generator, rows: int, n: int, rho: float) -> np.ndarray:
    x = rng.standard_normal((rows, n))
    for i in range(1, n):
        x[:, i] = rho * x[:, i - 1] + (1 - rho**2) ** 0.5 * x[:, i]
    return x


@pytest.mark.parametrize(("n", "rho"), [(64, 0.0), (64, 0.4), (350, 0.0), (350, 0.7)])
def test_intervals_cover_whatever_neighbours_share(n: int, rho: float) -> None:
    x = autoregressive(np.random.default_rng(n), 1500, n, rho)
    found = [window_mean(row, np.zeros(n)).estimate for row in x]
    covered = np.mean([one.low <= 0 <= one.high for one in found])  # type: ignore[operator]
    assert 0.93 <= covered <= 0.97


def test_newey_west_is_bartletts_weighted_sum() -> None:
    x = np.random.default_rng(0).standard_normal(20)
    x -= x.mean()
    lags, weights = 4, [1, 0.75, 0.5, 0.25]
    pairs = sum(
        weights[abs(i - j)] * x[i] * x[j] for i in range(20) for j in range(20) if abs(i - j) < lags
    )
    share = lags / 20
    part = newey_west(x)
    assert part.variance == pytest.approx(pairs / 400 / (1 - share + share**2 / 3))
    assert part.freedom == pytest.approx(7.5)


@pytest.mark.parametrize(("first", "second"), [(-3.0e-4, 5.4e-4), (2e-4, 1.2e-4)])
def test_two_plays_lie_within_the_interval_of_their_mean(first: float, second: float) -> None:
    """The quickstart's split: 350 windows of two documents, each mean known to 1.1e-4."""
    rng = np.random.default_rng(1)
    x = rng.normal(0, 1.1e-4 * 175**0.5, 350)
    for half, mean in ((slice(175), first), (slice(175, 350), second)):
        x[half] += mean - x[half].mean()
    found = window_mean(x, np.repeat([0, 1], 175))
    assert found.by == "350 windows, Newey-West"
    low, high = found.estimate.low, found.estimate.high
    assert low is not None and high is not None
    assert low < min(first, second) < max(first, second) < high


def test_correlation_within_documents_is_recovered() -> None:
    """Planted: 40 documents of 10 windows, half of the variance their own."""
    rng = np.random.default_rng(2)
    errors, means = [], []
    documents = np.repeat(np.arange(40), 10)
    for _ in range(400):
        x = rng.standard_normal(40)[documents] + rng.standard_normal(400)
        found = window_mean(x, documents)
        assert found.by == "40 documents" and found.estimate.freedom == pytest.approx(39)
        errors.append(found.estimate.standard_error)
        means.append(x.mean())
    truth = np.sqrt(1 / 40 + 1 / 400)
    assert np.mean(errors) == pytest.approx(truth, rel=0.03)
    assert np.std(means) == pytest.approx(truth, rel=0.1)
    assert clustered(np.ones(4), np.array([0, 0, 1, 1]), 2).variance == pytest.approx(1.0)


def test_what_branches_share_widens_their_interval() -> None:
    """Gaps of three checkpoints on the same windows, a shared error twice their own."""
    rng, false = np.random.default_rng(3), {"with": 0, "without": 0}
    for _ in range(1500):
        windows = rng.normal(0, 1.0, 64) * 2
        gaps = windows + rng.normal(0, 1.0, (9, 1)) * 0.375 + rng.normal(0, 1, (9, 64))
        strata = gaps.mean(1).reshape(3, 3).tolist()
        part = shared_part(gaps, np.zeros(64))
        assert part is not None
        false["without"] += estimate(strata).verdict != "not distinguishable"
        false["with"] += estimate(strata, [part]).verdict != "not distinguishable"
    assert false["with"] / 1500 < 0.065 < 0.2 < false["without"] / 1500


def test_the_units_own_noise_is_no_shared_error() -> None:
    """Nothing shared: what the windows' means over four units show is the units' noise."""
    rng = np.random.default_rng(4)
    found = []
    for _ in range(400):
        part = shared_part(rng.normal(0, 1, (4, 64)), np.zeros(64))
        assert part is not None
        found.append(part.variance)
    assert np.mean(found) < 0.35 / (4 * 64)  # half of the draws are zero, the others small
