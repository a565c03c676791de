"""Tokens to a target, spikes and the gradient norm's trend."""

import statistics
from pathlib import Path

import numpy as np
import pytest

from train.compare.dynamics import behaviour, common_target, norm_trend, tokens_to
from train.runs.run import Run
from train.stats.spikes import count_spikes, mean_before_spike


def run(val: list[float], status: str = "finished") -> Run:
    tokens = 100.0 * np.arange(1, len(val) + 1)
    loss = np.array(val)
    info = {"status": status, "seed": 0, "recipe": "x"}
    metrics = {"step": tokens, "tokens_seen": tokens, "train/loss": loss, "val/loss": loss}
    return Run(Path(), info, metrics)


@pytest.mark.parametrize("lost", [([9.0, 8.0], "failed"), ([9.0], "diverged"), ([9.0, np.nan],)])
def test_target_is_one_that_all_reach(lost: tuple[list[float]]) -> None:
    """But those that failed or diverged, be it in their last validation."""
    runs = [run([4.0, 2.0, 3.0]), run([5.0, 2.5]), run(*lost)]
    assert common_target(runs) == 2.5
    assert [tokens_to(one, 2.5) for one in runs] == [175.0, 200.0, None]
    assert tokens_to(runs[0], 4.0) == 100.0 and tokens_to(runs[0], None) is None


@pytest.mark.parametrize(
    ("val", "at_most"), [([2.5, 2.0], True), ([2.4, 3.0], True), ([2.6, 2.0], False), ([], False)]
)
def test_a_target_met_at_the_first_validation_was_met_before(
    val: list[float], at_most: bool
) -> None:
    assert behaviour(run(val), 2.5)["tokens_to_target_at_most"] is at_most


def test_spikes_are_those_that_training_reports() -> None:
    rng = np.random.default_rng(0)
    loss = 3 + rng.normal(0, 0.05, 2000) + 3 * np.exp(-np.arange(2000) / 100)
    loss[[5, 300, 301, 1200, 1999]] += 2.0
    expected = []
    for i in range(20, 2000):
        before = loss[max(0, i - 50) : i].tolist()
        if loss[i] > statistics.fmean(before) + max(6 * statistics.stdev(before), 0.1):
            expected.append(i)
    reported = [i for i in range(2000) if mean_before_spike(loss[i], loss[:i].tolist()) is not None]
    assert reported == expected
    assert count_spikes(loss) == len(expected) >= 3
    assert count_spikes(loss[:10]) == 0


def test_trend_is_the_last_tenth_over_the_middle() -> None:
    norm = np.ones(100)
    norm[90:] = 3.0
    norm[40:50] = 2.0
    assert norm_trend(norm) == (3.0, 1.5)
    assert norm_trend(norm[:5]) == (None, None)
    assert norm_trend(np.repeat([1.0, 4.0], 50)) == (4.0, pytest.approx(4.0))
