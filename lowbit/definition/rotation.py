"""Block Hadamard rotation of both operands of a GEMM along its contraction axis.

It spreads outliers over a block and leaves the product as it was, since the matrix is orthogonal:
(A R)(B R)ᵀ = A Bᵀ.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from lowbit.definition.blocks import from_blocks, to_blocks
from lowbit.definition.noise import Key, uniform

SIZES = (16, 32, 64, 128)


@dataclass(frozen=True)
class Rotation:
    """R = diag(signs) H / sqrt(size) on each run of `size` values, H the Sylvester-Hadamard matrix.

    `seed` draws the signs once for all layers and steps (as NVFP4 pretraining does, 2509.25149),
    or is "step": the layer then draws them anew for every optimizer step, from the seed of its
    `Randomness`; one set for all layers. Without a seed they are all +1.
    """

    size: int = 32
    seed: int | Literal["step"] | None = None

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"rotation size={self.size}, expected one of {SIZES}")
        if isinstance(self.seed, str) and self.seed != "step":
            raise ValueError(f"rotation seed={self.seed!r}, expected a number, step or none")

    @property
    def drawn_seed(self) -> int | None:
        """The seed; ValueError where only a training step could tell."""
        if isinstance(self.seed, str):
            raise ValueError("a rotation with seed=step has no matrix outside of training")
        return self.seed

    def matrix(self, device: torch.device | str | None = None) -> Tensor:
        """R, FP32 [size, size]."""
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
            return hadamard(
                self.size, self.drawn_seed, device
            )  # graphs and modes hold no tensor of ours
        return _kept(self.size, self.drawn_seed).to(device)


@lru_cache(maxsize=64)  # of signs that every step draws, the last ones
def _kept(size: int, seed: int | None) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return hadamard(size, seed, "cpu")


def hadamard(
    size: int, seed: int | None = None, device: torch.device | str | None = None
) -> Tensor:
    """diag(signs) H / sqrt(size), FP32 [size, size], for any power of two."""
    matrix = torch.full((1, 1), 1 / math.sqrt(size), dtype=torch.float32, device=device or "cpu")
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float32, device=matrix.device)
    while len(matrix) < size:
        matrix = torch.kron(two, matrix)
    if seed is None:
        return matrix
    signs = torch.where(uniform((size,), Key.of(seed), matrix.device) < 0.5, 1.0, -1.0)
    return signs[:, None].float() * matrix


def rotate(x: Tensor, rotation: Rotation, dim: int = -1, *, inverse: bool = False) -> Tensor:
    """`x` R in FP32, along `dim`; `inverse` undoes it up to rounding.

    An axis that `size` does not divide is filled with zeros, and the result keeps that length: a
    product over it is unchanged.

    >>> x = torch.eye(16)
    >>> torch.equal(rotate(rotate(x, Rotation(16, seed=1)), Rotation(16, seed=1), inverse=True), x)
    True
    """
    matrix = rotation.matrix(x.device)
    matrix = matrix.mT if inverse else matrix
    blocks, (inside,) = to_blocks(x.float(), rotation.size, dim)
    rotated = (blocks.movedim(inside, -1) @ matrix).movedim(-1, inside)
    shape = list(x.shape)
    shape[dim] = blocks.shape[inside - 1] * rotation.size
    return from_blocks(rotated, (inside,), tuple(shape))
