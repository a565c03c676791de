"""Block Hadamard rotation of both operands of a GEMM along its contraction axis.

It spreads outliers over a block and leaves the product as it was, since the matrix is orthogonal:
(A R)(B R)ᵀ = A Bᵀ.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lowbit.definition.blocks import from_blocks, to_blocks
from lowbit.definition.noise import Key, uniform

SIZES = (16, 32, 64, 128)


@dataclass(frozen=True)
class Rotation:
    """R = diag(signs) H / sqrt(size) on each run of `size` values, H the Sylvester-Hadamard matrix.

    `seed` draws the signs once for all layers and steps (as NVFP4 pretraining does, 2509.25149);
    without one they are all +1.
    """

    size: int = 32
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"rotation size={self.size}, expected one of {SIZES}")

    def matrix(self, device: torch.device | str | None = None) -> Tensor:
        """R, FP32 [size, size]."""
        matrix: Tensor = _matrix(self.size, self.seed)
        return matrix.to(device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch's
def _matrix(size: int, seed: int | None) -> Tensor:
    return _built(size, seed)


@cache
def _built(size: int, seed: int | None) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    if seed is not None:
        signs = torch.where(uniform((size,), Key.of(seed)) < 0.5, 1.0, -1.0)
        matrix = signs[:, None] * matrix
    return matrix / math.sqrt(size)


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
