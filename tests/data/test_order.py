"""The batch order: the same for any split of the batch, a uniform permutation, at once anywhere."""

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from data.module import Share, TrainingBatches
from data.order import BatchOrder, Permutation, _feistel

GLOBAL_BATCH_SIZE = 48


def order(num_windows: int = 1003, seed: int = 0) -> BatchOrder:
    return BatchOrder(num_windows, GLOBAL_BATCH_SIZE, seed, fingerprint="abc")


@given(st.integers(1, 5000), st.text(max_size=5))
def test_every_size_is_permuted(size: int, key: str) -> None:
    image = Permutation(size, key)(np.arange(size))
    assert sorted(image.tolist()) == list(range(size))


def test_an_image_does_not_depend_on_what_is_asked_beside_it() -> None:
    permutation = Permutation(1003, "key")
    together = permutation(np.arange(1003))
    assert [int(permutation(np.array([index]))[0]) for index in range(1003)] == together.tolist()


class Ids:
    """Windows that are nothing but their ids."""

    def batch(self, ids: np.ndarray, first_sample: int) -> dict[str, list[int]]:
        return {"window": ids.tolist(), "samples": [*range(first_sample, first_sample + len(ids))]}


def samples_of_a_step(step: int, world_size: int, accumulate: int) -> list[tuple[int, int]]:
    """(sample, window) of every micro-batch of every rank."""
    found = []
    for rank in range(world_size):
        share = Share(GLOBAL_BATCH_SIZE // (world_size * accumulate), rank, world_size, accumulate)
        batches = TrainingBatches(Ids(), order(), share, step)  # type: ignore[arg-type]
        for batch in itertools.islice(batches, accumulate):
            found += zip(batch["samples"], batch["window"], strict=True)
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8])
def test_ranks_and_micro_batches_tile_the_global_batch(world_size: int) -> None:
    for step in (0, 20, 21, 10**9):  # an epoch of 1003 windows ends within step 20
        expected = list(enumerate(order().windows(step).tolist()))
        for accumulate in (a for a in range(1, 49) if GLOBAL_BATCH_SIZE % (world_size * a) == 0):
            samples = samples_of_a_step(step, world_size, accumulate)
            assert len(samples) == GLOBAL_BATCH_SIZE  # disjoint, since complete
            assert sorted(samples) == expected


def test_each_epoch_takes_each_window_once_and_in_a_new_order() -> None:
    steps = range(3 * 1003 // GLOBAL_BATCH_SIZE + 1)
    stream = np.concatenate([order().windows(step) for step in steps])
    epochs = [stream[start : start + 1003].tolist() for start in (0, 1003, 2006)]
    assert all(sorted(epoch) == list(range(1003)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_seed_and_data_decide_the_order() -> None:
    orders = [
        BatchOrder(1003, 48, seed, fingerprint) for seed in (0, 1) for fingerprint in ("a", "b")
    ]
    assert len({tuple(order.windows(0)) for order in orders}) == 4


def test_the_order_is_the_one_that_earlier_versions_had() -> None:
    expected = [459116, 472335, 597697, 699505, 976259, 966090, 399420, 552452]
    assert BatchOrder(10**6, 8, 0, "abc").windows(12345).tolist() == expected


def test_step_a_billion_starts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No table, no walk through what came before: as many values are permuted as at step 0."""
    permuted: list[int] = []

    def counted(values: NDArray[np.uint64], *arguments: Any) -> NDArray[np.uint64]:
        permuted.append(len(values))
        return _feistel(values, *arguments)

    monkeypatch.setattr("data.order._feistel", counted)
    BatchOrder(10**12, 512, 0, "abc").windows(10**9)
    assert 512 <= sum(permuted) < 2 * 512  # some walk on: 10^12 of 2^40 images are in range


@pytest.mark.parametrize(("num_windows", "size"), [(10, 11), (10, 0)])
def test_a_batch_must_fit_the_windows(num_windows: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"global_batch_size={size} of {num_windows} windows"):
        BatchOrder(num_windows, size, 0, "abc")


def upper_tail(statistic: float, degrees: int) -> float:
    """The probability of a chi-square value at least as large."""
    half = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("num_windows", "epochs", "bins"), [(60, 250, 60), (4099, 40, 64)])
def test_positions_take_windows_from_everywhere_evenly(
    seed: int, num_windows: int, epochs: int, bins: int
) -> None:
    positions = np.arange(num_windows)
    orders = BatchOrder(num_windows, 1, seed, "abc")
    images = np.stack([orders.epoch(epoch)(positions) for epoch in range(epochs)])
    bin_of = positions * bins // num_windows
    table = np.zeros((bins, bins))
    np.add.at(table, (np.broadcast_to(bin_of, images.shape), bin_of[images]), 1)
    sizes = np.bincount(bin_of)
    expected = np.outer(sizes, sizes) * epochs / num_windows
    # Rows and columns are full in any permutation: (bins - 1)^2 degrees, variance n / (n - 1).
    statistic = float(((table - expected) ** 2 / expected).sum()) * (1 - 1 / num_windows)
    assert upper_tail(statistic, (bins - 1) ** 2) > 1e-3
    assert upper_tail(statistic, (bins - 1) ** 2) < 1 - 1e-3  # nor more even than chance


@pytest.mark.parametrize("seed", range(20))
def test_neighbours_are_not_correlated(seed: int) -> None:
    num_windows, bins = 10007, 64
    image = BatchOrder(num_windows, 1, seed, "abc").epoch(0)(np.arange(num_windows))
    for lag in (1, 2, 512):
        correlation = np.corrcoef(image[:-lag], image[lag:])[0, 1]
        assert upper_tail(correlation**2 * (num_windows - lag), 1) > 1e-3
        steps = (image[lag:] - image[:-lag]) % num_windows  # 1 .. n - 1, each as likely
        counts = np.bincount((steps - 1) * bins // (num_windows - 1), minlength=bins)
        expected = np.bincount(np.arange(num_windows - 1) * bins // (num_windows - 1))
        expected = expected * len(steps) / (num_windows - 1)
        statistic = float(((counts - expected) ** 2 / expected).sum())
        assert upper_tail(statistic, bins - 1) > 1e-3


def test_all_orders_of_four_windows_are_as_likely() -> None:
    keys = range(720)
    orders = Counter(tuple(Permutation(4, str(key))(np.arange(4)).tolist()) for key in keys)
    assert len(orders) == 24
    assert upper_tail(sum((count - 30) ** 2 / 30 for count in orders.values()), 23) > 1e-3
