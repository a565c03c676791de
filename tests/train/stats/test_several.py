"""Several comparisons, power, equivalence, sign flips: against tables and independent draws."""

import itertools

import numpy as np
import pytest

from train.stats.intervals import Estimate, Part, t_cdf, t_quantile, verdict_of
from train.stats.power import detectable, equivalence_power, equivalent, power
from train.stats.several import dunnett_quantile, holm, sidak_quantile
from train.stats.sign_flip import sign_flip_p


@pytest.mark.parametrize("df", [1, 2, 3, 7, 10, 99])
@pytest.mark.parametrize("t", [-3.0, -0.2, 0.0, 0.7, 2.5, 12.0])
def test_t_cdf_is_the_finite_sum_of_whole_degrees_of_freedom(t: float, df: int) -> None:
    """Abramowitz and Stegun 26.7.3-4."""
    theta = np.arctan(t / np.sqrt(df))
    even = df % 2 == 0
    terms, term = [], 1.0 if even else np.cos(theta)
    for k in range(2 + df % 2, df + 1, 2):
        terms.append(term)
        term *= np.cos(theta) ** 2 * (k - 1) / k
    total = sum(terms)
    odd = (theta + np.sin(theta) * total) / np.pi
    assert t_cdf(t, df) == pytest.approx(0.5 + (np.sin(theta) * total / 2 if even else odd))


def test_t_between_whole_degrees_lies_between() -> None:
    assert t_quantile(0.975, 3) < t_quantile(0.975, 2.5) < t_quantile(0.975, 2)


@pytest.mark.parametrize(("m", "published"), [(2, 2.21), (5, 2.51)])
def test_dunnett_is_the_published_one_for_many_units(m: int, published: float) -> None:
    """Dunnett 1964, two-sided 5 %, infinitely many degrees of freedom."""
    rng = np.random.default_rng(m)
    e = rng.standard_normal((100_000, m + 1))
    exact = np.quantile(np.abs((e[:, 1:] - e[:, :1]) / 2**0.5).max(1), 0.95)
    assert exact == pytest.approx(published, abs=0.015)
    assert dunnett_quantile(m, 60) == pytest.approx(published, rel=0.045)  # of 59, each its own


@pytest.mark.parametrize(("m", "n"), [(2, 3), (5, 3), (5, 8)])
def test_families_are_false_in_five_percent(m: int, n: int) -> None:
    e = np.random.default_rng(1).standard_normal((40_000, m + 1, n))
    gaps = e[:, 1:] - e[:, :1]
    t = np.abs(gaps.mean(2)) / (gaps.std(2, ddof=1) / n**0.5)
    assert np.mean(t.max(1) > dunnett_quantile(m, n)) == pytest.approx(0.05, abs=0.004)
    assert 0.04 < np.mean(t.max(1) > sidak_quantile(m, n - 1)) < 0.052


def test_holm_by_hand_and_over_all_pairs() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    rng, false = np.random.default_rng(2), 0
    for _ in range(2000):
        e = rng.standard_normal((4, 5))
        pairs = [e[b] - e[a] for a, b in itertools.combinations(range(4), 2)]
        found = [Estimate.of(5, x.mean(), [Part(x.var(ddof=1) / 5, 4)]).p for x in pairs]
        false += min(holm([p for p in found if p is not None])) < 0.05
    assert false / 2000 < 0.06


@pytest.mark.parametrize("df", [2, 5, 12.5])
def test_power_and_what_is_detectable_are_those_of_drawn_data(df: float) -> None:
    rng = np.random.default_rng(3)
    s = np.sqrt(rng.chisquare(df, 200_000) / df)
    z = rng.standard_normal(200_000)
    critical = t_quantile(0.975, df)
    effect = detectable(df, critical)
    drawn = np.mean(np.abs(z + effect) > critical * s)
    assert drawn == pytest.approx(0.8, abs=0.005)
    assert power(0, df, critical) == pytest.approx(0.05, abs=0.002)


def test_equivalence_is_rarely_false_and_has_the_power_it_says() -> None:
    rng, n, margin = np.random.default_rng(4), 6, 1.0
    for truth, wanted in ((margin, None), (-margin, None), (0.0, "power")):
        x = rng.normal(truth, 0.8, (4000, n))
        found = [Estimate.of(n, r.mean(), [Part(r.var(ddof=1) / n, n - 1)]) for r in x]
        share = np.mean([equivalent(one, margin) for one in found])
        if wanted is None:
            assert share <= 0.058
        else:
            expected = equivalence_power(Estimate(n, 0.0, 0.8 / n**0.5, n - 1), margin)
            assert share == pytest.approx(expected, abs=0.02)


def test_sign_flips_are_all_signs() -> None:
    rng = np.random.default_rng(5)
    gaps = rng.normal(0.3, 1, 7)
    signs = np.array(list(itertools.product([-1, 1], repeat=7)))
    reached = np.abs(signs @ gaps) >= abs(gaps.sum()) - 1e-12
    assert sign_flip_p(gaps) == reached.mean()
    assert sign_flip_p(gaps[:5]) is None
    assert sign_flip_p(np.ones(6)) == 2 / 64
    many = sign_flip_p(rng.normal(0.8, 1, 20))
    assert many is not None and many < 0.05


def test_rounding_is_no_spread() -> None:
    assert Estimate.of(3, 1e-15, [Part(1e-33, 2)]).verdict == "no spread: no verdict"
    assert verdict_of(0.1, 0.2) == "worse" and verdict_of(-0.2, -0.1) == "better"
