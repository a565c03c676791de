"""What the kernels of all devices make of an operator's arguments.

A tensor is read as it lies in memory, seen as a batch of matrices in 2-D blocks; a format is the
list of numbers of request.py's `describe`.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}  #: types of patterns
LEAST = 2.0**-117  #: tensor scale of NV formats
_ELEMENT_AND_SCALE = 15  # so many numbers of a format come before its block's one or two sizes


class Layout(NamedTuple):
    """[outer, rows, columns] in blocks of block_rows x block_columns."""

    outer: int
    rows: int
    columns: int
    block_rows: int
    block_columns: int


def tensor_range(format: Sequence[float]) -> tuple[float, float]:
    """What the largest magnitude is divided by to be a tensor scale, and the least that is one."""
    element_max, (mantissa_bits, min_exponent, scale_max) = format[4], format[10:13]
    return scale_max * element_max, max(LEAST, 2.0 ** (-126 - min_exponent + mantissa_bits))


@lru_cache(maxsize=4096)
def layout(shape: tuple[int, ...], dim: int, block: tuple[int, ...]) -> Layout:
    """Of a tensor of `shape` without gaps, in blocks along `dim`; a 2-D block: the last two."""
    if len(block) == 2:
        rows, columns = shape[-2:]
        sizes = min(block[0], rows), min(block[1], columns)
    elif dim == len(shape) - 1:
        rows, columns = math.prod(shape[:-1]), shape[-1]
        sizes = 1, columns if block[0] == -1 else min(block[0], columns)
    else:
        rows, columns = shape[dim], math.prod(shape[dim + 1 :])
        sizes = rows if block[0] == -1 else min(block[0], rows), 1
    return Layout(math.prod(shape) // (rows * columns), rows, columns, *sizes)


def order_of(x: Tensor) -> list[int]:
    """The axes by falling stride: the order in which the values lie."""
    strides = x.stride()
    return sorted(range(x.dim()), key=lambda axis: (-strides[axis], axis))


def without_gaps(x: Tensor, by_position: bool) -> tuple[Tensor, list[int]]:
    """`x`, copied only if it has gaps, and the order of its axes in memory.

    `by_position`: what is made of it depends on the axes' own order, which then is the memory's.
    """
    order = list(range(x.dim()))
    if x.is_contiguous():
        return x, order
    lying = order_of(x)
    if by_position or not x.permute(lying).is_contiguous():
        return x.contiguous(), order
    return x, lying


def element_and_scale(format: list[float]) -> list[float]:
    """A format's numbers without its block."""
    return format[:_ELEMENT_AND_SCALE]


def block_of(format: list[float]) -> tuple[int, ...]:
    """The size of a format's blocks along one axis, or along the last two."""
    return tuple(map(int, format[_ELEMENT_AND_SCALE:]))


def two_formats(formats: list[float]) -> tuple[list[float], list[float]]:
    """Of `quantize_both`, whose blocks are 1-D."""
    return formats[: _ELEMENT_AND_SCALE + 1], formats[_ELEMENT_AND_SCALE + 1 :]


def empty_both(x: Tensor, dtypes: list[torch.dtype]) -> tuple[Tensor, Tensor]:
    """Where `quantize_both` writes: the second result lies transposed."""
    rows, columns = x.shape
    return x.new_empty(rows, columns, dtype=dtypes[0]), x.new_empty(columns, rows, dtype=dtypes[1])
