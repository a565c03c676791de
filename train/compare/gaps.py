"""Paired gaps between recipes: seeds are the units, and a verdict needs at least three of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from train.runs.run import Curve, Run
from train.stats.intervals import MIN_UNITS
from train.stats.sign_flip import sign_flip_p
from train.stats.strata import estimate

TAIL = 0.9  # a descriptive band spans the steps after this share of the tokens
RULE = (
    "Verdict of b against a: the paired gap is val loss of b minus that of a at the last tokens"
    " where all their runs were evaluated, one gap per seed. worse (better) if the interval of its"
    f" mean over at least {MIN_UNITS} seeds lies above (below) zero: Student-t, 95 % for all rows"
    " against the baseline together (Dunnett; branches: Šidák), other pairs by Holm. Otherwise not"
    " distinguishable, beside the smallest effect that such a spread shows in 80 % of cases. Fewer"
    " seeds: no verdict, only a band (5th to 95th percentile of the smoothed train gap over the"
    " last 10 % of the tokens), which describes these runs and is no confidence interval."
)


@dataclass(frozen=True)
class Pair:
    """Label `b` against label `a`; what could not be had is None."""

    a: str
    b: str
    seeds: list[int]
    verdict: str
    tokens: int | None = None
    gaps: list[float] | None = None
    mean: float | None = None
    relative: float | None = None  # mean over the mean val loss of a
    standard_error: float | None = None
    freedom: float | None = None  # degrees of it
    low: float | None = None
    high: float | None = None
    p_sign_flip: float | None = None
    first_stage: list[int] | None = None  # the seeds whose spread this is, after Stein's two stages
    band: tuple[float, float] | None = None


def matched(a: Curve, b: Curve) -> Curve:
    """b - a at the tokens both hold."""
    tokens, in_a, in_b = np.intersect1d(a[0], b[0], assume_unique=True, return_indices=True)
    return tokens, b[1][in_b] - a[1][in_a]


def val_gaps(pairs: list[tuple[Run, Run]]) -> Curve:
    """Val gaps, one row per pair, at the tokens where every run of `pairs` was evaluated."""
    gaps = [matched(a.val_curve, b.val_curve) for a, b in pairs]
    tokens = reduce(np.intersect1d, [tokens for tokens, _ in gaps])
    return tokens, np.array([gap[np.isin(at, tokens)] for at, gap in gaps])


def pairs_of(a: dict[int, Run], b: dict[int, Run]) -> list[tuple[Run, Run]]:
    """Runs of one seed that neither failed; failed runs carry no loss to speak of."""
    shared = [(a[seed], b[seed]) for seed in a if seed in b]
    return [pair for pair in shared if "failed" not in (pair[0].status, pair[1].status)]


def compare_pair(a: dict[int, Run], b: dict[int, Run], first: Sequence[int] = ()) -> Pair:
    """Runs by seed; both non-empty, each of one label. `first`: the first stage's seeds, if the
    number of seeds was chosen by their spread.
    """
    label_a, label_b = next(iter(a.values())).label, next(iter(b.values())).label
    pairs = sorted(pairs_of(a, b), key=lambda pair: pair[0].seed not in first)
    seeds = [run.seed for run, _ in pairs]
    if not pairs or (diverged := _diverged(pairs)):
        return Pair(label_a, label_b, seeds, diverged if pairs else "no paired seeds: no verdict")
    tokens, gaps = val_gaps(pairs)
    if not len(tokens):
        return Pair(label_a, label_b, seeds, "no matched validation: no verdict", band=_band(pairs))
    final, n = gaps[:, -1], len(pairs)
    losses = [run.val_curve[1][run.val_curve[0] == tokens[-1]][0] for run, _ in pairs]
    at = int(tokens[-1]), final.tolist(), float(final.mean()), float(final.mean() / np.mean(losses))
    if n < MIN_UNITS:
        verdict = f"{('one seed', 'two seeds')[n - 1]}: no verdict"
        return Pair(label_a, label_b, seeds, verdict, *at, band=_band(pairs))
    stage = [seed for seed in seeds if seed in first]
    if first and len(stage) < 2:  # another spread would be one that the seeds' number followed
        verdict = f"{len(stage)} of the first stage's {len(first)} seeds left: no verdict"
        return Pair(label_a, label_b, seeds, verdict, *at)
    found = estimate([final.tolist()], first=len(stage) or None)
    bounds = found.standard_error, found.freedom, found.low, found.high, sign_flip_p(final)
    return Pair(label_a, label_b, seeds, found.verdict, *at, *bounds, first_stage=stage or None)


def _diverged(pairs: list[tuple[Run, Run]]) -> str:
    """Who, and in which seeds; empty if none did."""
    lost: dict[str, list[int]] = {}
    for run in (run for pair in pairs for run in pair if run.status == "diverged"):
        lost.setdefault(run.label, []).append(run.seed)
    said = [
        f"{label} (seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))})"
        for label, seeds in sorted(lost.items())
    ]
    return f"{' and '.join(said)} diverged: no verdict" if said else ""


def _band(pairs: list[tuple[Run, Run]]) -> tuple[float, float] | None:
    """Where the smoothed train gaps ended up: autocorrelated, hence no interval."""
    gaps = [matched(a.train_curve, b.train_curve) for a, b in pairs]
    tail = np.concatenate([gap[at >= TAIL * at[-1]] for at, gap in gaps if len(at)] or [[]])
    return tuple(np.percentile(tail, [5, 95]).tolist()) if len(tail) else None
