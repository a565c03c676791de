"""What a quantizer is tried on: eight kinds of finite data, and special values."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from lowbit import BlockFormat

ROWS, BLOCKS = 1024, 8


def shape_for(format: BlockFormat) -> tuple[int, int]:
    """Rows, and columns of eight blocks; ValueError for blocks that are no vectors."""
    if isinstance(format.block_size, tuple):
        raise ValueError(f"{format}: an audit is of blocks along the last axis, these are 2-D")
    return ROWS, BLOCKS * (format.block_size if format.block_size > 0 else 32)


def finite_kinds(format: BlockFormat, seed: int) -> dict[str, Tensor]:
    """FP32 tensors of `shape_for(format)` by name; all values are finite, in BF16 too."""
    shape = shape_for(format)
    g = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(shape, generator=g)

    def drawn(values: list[float]) -> Tensor:
        return torch.tensor(values)[torch.randint(0, len(values), shape, generator=g)]

    row_scales = 10.0 ** (40 * torch.rand(shape[0], 1, generator=g) - 20)
    largest = torch.finfo(torch.bfloat16).max
    ends = [largest, 1e38, 1.2e-38, 2.0**-126, 1e-40, 0.0, -0.0, 1.0]
    return {
        "Gaussian": normal(),
        "heavy tails": normal() / torch.rand(shape, generator=g).clamp_min(1e-6),
        "40 decades": normal() * row_scales,
        "BF16 grid": normal().bfloat16().float(),
        "ties": _ties(format, shape, g),
        "powers of two": drawn([2.0**k for k in range(-12, 12)]) * normal().sign(),
        "outliers": normal() * 1e-4 + 1e4 * (torch.rand(shape, generator=g) < 1e-5),
        "range ends": drawn(ends) * normal().sign(),
    }


def _ties(format: BlockFormat, shape: tuple[int, int], g: torch.Generator) -> Tensor:
    """Each block's first value is the largest code; others lie between two, or an ulp beside."""
    values = [value for value in format.element.values if value >= 0]
    middles = torch.tensor([(a + b) / 2 for a, b in pairwise(values)])
    x = middles[torch.randint(0, len(middles), shape, generator=g)]
    block = shape[1] // BLOCKS
    x[:, ::block] = format.element.max
    scale = 2.0 ** torch.randint(-4, 4, (shape[0], BLOCKS), generator=g)
    x *= scale.repeat_interleave(block, 1)
    ulps = torch.randint(-1, 2, shape, generator=g, dtype=torch.int32)
    ulps[:, ::block] = 0
    return (x.view(torch.int32) + ulps).view(torch.float32)


def special_kinds(format: BlockFormat) -> dict[str, Tensor]:
    """Small FP32 tensors, each with one kind of special value in its second block."""
    block = shape_for(format)[1] // BLOCKS
    plain = torch.linspace(-3, 3, 4 * BLOCKS * block).reshape(4, -1)

    def with_values(*values: float) -> Tensor:
        x = plain.clone()
        x[1, block : 2 * block] = torch.tensor(values).repeat(block)[:block]
        return x

    return {
        "NaN": with_values(math.nan, 1.0),
        "infinity": with_values(math.inf, 1.0, -math.inf),
        "a block of zeros": with_values(0.0, -0.0),
        "near the least normal": with_values(1.2e-38, -(2.0**-126), 3 * 2.0**-125),
        "subnormal values": with_values(2.0**-140, -(2.0**-149), 2.0**-127),
        "a partial last block": plain[:, : -(block // 2) - 1],
        "one row of one block": plain[:1, :block],
        "no values": plain[:0],
    }
