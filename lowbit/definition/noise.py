"""Counter-based uniform numbers: a pure function of a key and of an element's global position.

Nothing is drawn and nothing advances, so a repeat (resume, activation checkpointing) gives the same
bits, and any split of a batch into ranks and micro-batches the same bits as the whole.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_MASK = 0xFFFF_FFFF
_GOLDEN = 0x9E37_79B9  # 2^32 / golden ratio: spreads consecutive integers over all bits


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers, held in int64; every input bit flips half of the output.

    The two-round multiply-xorshift hash with the multiplier 0x45D9F3B (T. Mueller), which is
    below 2^31: the products stay below 2^63, so that no overflow rule of any compiler is used.
    """
    for _ in range(2):
        x = ((x >> 16) ^ x).mul_(0x45D_9F3B).bitwise_and_(_MASK)
    return (x >> 16) ^ x


def _integer(value: int | Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(torch.int64)
    return torch.tensor(value, dtype=torch.int64, device="cpu")  # whatever the default is


@dataclass(frozen=True)
class Key:
    """Names one stream of random numbers; `first_row` says where a tensor lies in the whole.

    >>> key = Key.of(0).fold(step := 7)
    >>> whole = uniform((4, 3), key)
    >>> torch.equal(whole[2:], uniform((2, 3), key.at(2)))
    True
    """

    state: Tensor  #: int64 scalar in 0 .. 2^32-1
    first_row: Tensor  #: int64 scalar: global index of the first row of the tensors it is used on

    @classmethod
    def of(cls, seed: int | Tensor) -> "Key":
        """The key that a seed's streams all fold from."""
        return cls(_mix(_integer(seed) & _MASK), _integer(0))

    def fold(self, number: int | Tensor) -> "Key":
        """The key of a sub-stream (a step, a layer, an operand)."""
        mixed = _mix(_integer(number) + 1 & _MASK)
        return replace(self, state=_mix((self.state * 31 + mixed) & _MASK))

    def at(self, first_row: int | Tensor) -> "Key":
        """The same stream, for a tensor that begins at this row of the whole."""
        return replace(self, first_row=_integer(first_row))


def uniform(shape: tuple[int, ...], key: Key, device: torch.device | str | None = None) -> Tensor:
    """FP32 numbers k / 2^24 in [0, 1), shape `shape`: last axis columns, the others rows."""
    device = device or "cpu"
    columns = shape[-1] if shape else 1
    rows = 1
    for size in shape[:-1]:
        rows *= size
    row = key.first_row.to(device) + torch.arange(rows, device=device)
    # rows beyond 2^32 fold their high half in, so that no two rows of a batch share a stream
    row_state = _mix(_mix((row & _MASK) ^ key.state.to(device)) ^ (row >> 32) * _GOLDEN & _MASK)
    column = torch.arange(columns, device=device) * _GOLDEN & _MASK
    bits = _mix(row_state[:, None] ^ column)
    return (bits >> 8).float().mul_(2.0**-24).reshape(shape)


class Randomness:
    """Where training stands, shared by all layers of a model: seed, optimizer step, first row.

    Call `set` before each micro-batch: without it every step draws the numbers of step 0. Step and
    row are tensors changed in place: a compiled model is not compiled again for them.
    """

    def __init__(self, seed: int) -> None:
        with torch.inference_mode(False):
            self._seed = Key.of(seed)
            self._step = _integer(0)
            self._first_row = _integer(0)
        self._layers = 0

    def claim(self, layers: int) -> int:
        """The first of so many indices that no layer has: parts of a model draw apart."""
        first, self._layers = self._layers, self._layers + layers
        return first

    def set(self, step: int, first_row: int | Tensor) -> None:
        """The optimizer step, and the global row (sample x seq_len) of the first token."""
        self._step.fill_(step)
        self._first_row.fill_(first_row)

    def signs(self) -> int:
        """The seed of this step's rotations, of all layers; of the step alone, for ranks agree."""
        return int(self._seed.fold(self._step).state)

    def key(self, layer: int) -> Key:
        """The key of the layer with this index, now."""
        # clones: the backward of this micro-batch must not see the next one's numbers
        return self._seed.fold(self._step.clone()).fold(layer).at(self._first_row.clone())
