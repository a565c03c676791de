"""The batch order: which windows make the global batch of step k, a pure function, no table."""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8  # even: the halves end where they began
_MIN_BITS = 6  # a network over fewer values would visibly favour some orders


@dataclass(frozen=True)
class Permutation:
    """A pseudo-random bijection of range(size), per index: a Feistel network with cycle walking."""

    size: int
    key: str

    def __post_init__(self) -> None:
        if not 1 <= self.size < 2**62:
            raise ValueError(f"a permutation of {self.size} values: expected 1 to 2^62 - 1")

    def __call__(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """The images of `index`, values in range(size)."""
        bits = max(_MIN_BITS, (self.size - 1).bit_length())
        keys = _round_keys(self.key)
        values = _feistel(index.astype(np.uint64), bits, keys)
        # Walk on from images outside the range: they lie on cycles that return to it.
        while (outside := values >= self.size).any():
            values[outside] = _feistel(values[outside], bits, keys)
        return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of the values of `bits` bits; their halves change places in each round."""
    low, high = np.uint64(bits // 2), np.uint64(bits - bits // 2)
    left, right = values >> low, values & _mask(low)
    width, other = high, low
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & _mask(width))
        width, other = other, width
    return (left << low) | right


def _mask(bits: np.uint64) -> np.uint64:
    return (np.uint64(1) << bits) - np.uint64(1)


def _round_keys(key: str) -> NDArray[np.uint64]:
    digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8")


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): each input bit moves all outputs."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class BatchOrder:
    """Epoch after epoch of shuffled windows, cut into global batches; one may span two epochs."""

    num_windows: int
    global_batch_size: int
    seed: int
    fingerprint: str

    def __post_init__(self) -> None:
        if not 1 <= self.global_batch_size <= self.num_windows:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} of {self.num_windows} windows: "
                "expected at least one window and at most all of them"
            )

    def windows(self, step: int) -> NDArray[np.int64]:
        """Window ids of the global batch of `step`, counted from 0."""
        positions = step * self.global_batch_size + np.arange(self.global_batch_size)
        epochs, indices = np.divmod(positions, self.num_windows)
        ids = np.empty_like(indices)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            ids[chosen] = self.epoch(int(epoch))(indices[chosen])
        return ids

    def epoch(self, epoch: int) -> Permutation:
        """The order of one epoch."""
        return Permutation(self.num_windows, f"{self.seed}:{self.fingerprint}:{epoch}")
