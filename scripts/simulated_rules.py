"""The rules of `lowbit compare` over many simulations at once, for simulate_errors.py.

The first CHECKED of each are computed again by train.stats, and must come out alike.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from train.stats.intervals import t_quantile
from train.stats.serial import BANDWIDTH, shared_part, window_mean
from train.stats.several import dunnett_quantile
from train.stats.sign_flip import sign_flip_p
from train.stats.strata import estimate, over_strata

Array = np.ndarray
CHECKED = 5


@lru_cache
def _table(p: float) -> tuple[Array, Array]:
    inverse = np.concatenate([np.linspace(0.001, 0.2, 200), np.linspace(0.205, 1.0, 160)])
    return inverse, np.array([t_quantile(p, 1 / x) for x in inverse])


def quantile(df: Array | float, p: float = 0.975) -> Array:
    inverse, values = _table(p)
    found: Array = np.interp(1 / np.asarray(df, float), inverse, values)
    return found


@dataclass(frozen=True)
class Found:
    """Of every simulation: the estimate, its error and what it is multiplied by."""

    mean: Array
    error: Array
    reach: Array

    def calls(self, effect: float | Array = 0.0) -> Array:
        called: Array = np.abs(self.mean + effect) > self.reach * self.error
        return called


def over_units(x: Array) -> Found:
    """Student-t over axis 1."""
    n = x.shape[1]
    for row in x[:CHECKED]:
        check(
            estimate([row.tolist()]).high, row.mean() + quantile(n - 1) * row.std(ddof=1) / n**0.5
        )
    error = x.std(1, ddof=1) / n**0.5
    return Found(x.mean(1), error, np.full(len(x), quantile(n - 1)))


def over_checkpoints(x: Array, windows: Array | None = None) -> Found:
    """[simulations, checkpoints, branches]: Welch; `windows`: gaps of [.., windows] besides."""
    k, n = x.shape[1:]
    variance = x.var(2, ddof=1) / n / k**2
    freedom = np.full((k, 1), n - 1.0)
    parts, freedoms = variance, np.repeat(freedom, len(x), 1).T
    if windows is not None:
        shared = np.array([_shared(gaps.reshape(k * n, -1)) for gaps in windows])
        parts = np.concatenate([variance, shared[:, :1]], 1)
        freedoms = np.concatenate([freedoms, shared[:, 1:]], 1)
    total = parts.sum(1)
    df = total**2 / (parts**2 / freedoms).sum(1)
    mean = x.mean((1, 2))
    found = Found(mean, np.sqrt(total), quantile(df))
    for i, strata in enumerate(x[:CHECKED]):
        own = [] if windows is None else [shared_part(windows[i].reshape(k * n, -1), [0] * 64)]
        expected = estimate(strata.tolist(), [part for part in own if part])
        check(expected.high, mean[i] + found.reach[i] * found.error[i])
    return found


def _shared(gaps: Array) -> tuple[float, float]:
    part = shared_part(gaps, np.zeros(gaps.shape[1]))  # type: ignore[arg-type]  # one document
    assert part is not None
    return part.variance, part.freedom


def like_these(x: Array) -> Found:
    for row in x[:CHECKED]:
        n = len(row)
        check(
            over_strata(row.tolist()).high, row.mean() + quantile(n - 1) * row.std(ddof=1) / n**0.5
        )
    return over_units(x)


def newey_west_rows(x: Array) -> Found:
    n = x.shape[1]
    lags = round(BANDWIDTH * n)
    residuals = x - x.mean(1, keepdims=True)
    total = (residuals**2).sum(1)
    for lag in range(1, lags):
        products = np.einsum("ij,ij->i", residuals[:, lag:], residuals[:, :-lag])
        total += 2 * (1 - lag / lags) * products
    share = lags / n
    error = np.sqrt(np.maximum(total, 0) / n**2 / (1 - share + share**2 / 3))
    found = Found(x.mean(1), error, np.full(len(x), quantile(1.5 / share)))
    for i, row in enumerate(x[:CHECKED]):
        check(window_mean(row, [0] * n).estimate.high, found.mean[i] + found.reach[i] * error[i])
    return found


def by_documents(x: Array, documents: Array) -> Found:
    count = int(documents.max()) + 1
    residuals = x - x.mean(1, keepdims=True)
    sums = np.stack([residuals[:, documents == g].sum(1) for g in range(count)], 1)
    error = np.sqrt((sums**2).sum(1) / x.shape[1] ** 2 * count / (count - 1))
    effective = x.shape[1] ** 2 / (np.bincount(documents) ** 2).sum()
    found = Found(x.mean(1), error, np.full(len(x), quantile(effective - 1)))
    for i, row in enumerate(x[:CHECKED]):
        expected = window_mean(row, documents.tolist()).estimate.high
        check(expected, found.mean[i] + found.reach[i] * error[i])
    return found


def check(expected: float | None, found: float) -> None:
    assert expected is not None and np.isclose(expected, found, rtol=2e-4, atol=1e-9)


def stein(x: Array) -> Found:
    """[simulations, planned]: four tell how many; the target is met by 12 of the true spread."""
    runs, planned = x.shape
    spread = x[:, :4].std(1, ddof=1)
    n = np.clip(np.ceil(spread**2 * 12), 4, planned).astype(int)
    mean = np.cumsum(x, 1)[np.arange(runs), n - 1] / n
    for i in range(CHECKED):
        found = estimate([x[i, : n[i]].tolist()], first=4)
        check(found.standard_error, spread[i] / n[i] ** 0.5)
    return Found(mean, spread / np.sqrt(n), np.full(runs, quantile(3)))


def family(losses: Array) -> Array:
    """[simulations, recipes, seeds]: whether any is called different from the first."""
    recipes, n = losses.shape[1:]
    gaps = losses[:, 1:] - losses[:, :1]
    t = np.abs(gaps.mean(2)) / (gaps.std(2, ddof=1) / n**0.5)
    any_called: Array = t.max(1) > dunnett_quantile(recipes - 1, n)
    return any_called


def sign_flips(x: Array) -> Array:
    n = x.shape[1]
    signs = 1 - 2 * ((np.arange(1 << n)[:, None] >> np.arange(n)) & 1)
    found = np.abs(x.sum(1, keepdims=True))
    p: Array = (np.abs(x @ signs.T) >= found * (1 - 1e-12)).mean(1)
    for row, own in zip(x[:CHECKED], p, strict=False):
        assert sign_flip_p(row) == own
    return p
