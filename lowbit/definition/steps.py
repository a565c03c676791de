"""The definition's two steps, blocks divided by their scales and quotients rounded, in PyTorch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.definition.blocks import to_blocks
from lowbit.definition.noise import Key, uniform
from lowbit.definition.rounding import round_to_bf16, round_to_element_
from lowbit.definition.scale import (
    block_amax,
    e4m3_scale,
    e8m0_scale,
    inverse,
    linear_scale,
    tensor_scale,
)
from lowbit.formats import Arithmetic, BlockFormat, Rounding, ScaleFormat


@dataclass(frozen=True)
class Scaled:
    """A tensor in blocks, divided by its scales."""

    y: Tensor  #: the quotient; BF16 where every step on BF16 input is exact in it, else FP32
    scale: Tensor  #: FP32, of each block
    tensor_scale: Tensor | None
    inside: tuple[int, ...]  #: axes of `y` inside a block
    shape: tuple[int, ...]  #: of the tensor that was blocked


def scaled_blocks(x: Tensor, format: BlockFormat, dim: int) -> Scaled:
    """`x` over the scales of its blocks along `dim`."""
    matrix = x.detach().reshape(x.shape or (1,)).to(_working_dtype(x, format))
    if format.arithmetic is Arithmetic.BF16:
        matrix = round_to_bf16(matrix)
    blocks, inside = to_blocks(matrix, format.block_size, dim)
    amax = block_amax(blocks, inside)
    above = None
    match format.scale:
        case ScaleFormat.E8M0:
            scale = e8m0_scale(amax, format)
            y = blocks * inverse(scale).to(blocks.dtype)
        case ScaleFormat.E4M3:
            above = tensor_scale(matrix, format)
            scale = e4m3_scale(amax, format, above)
            y = _quotient(blocks, scale * above, format)
        case ScaleFormat.BF16 | ScaleFormat.FP32:
            scale = linear_scale(amax, format)
            y = _quotient(blocks, scale, format)
    return Scaled(y, scale, above, inside, matrix.shape)


def rounded(
    scaled: Scaled, format: BlockFormat, dim: int, key: Key | None, clamp: bool = True
) -> Tensor:
    """Codes in units of the scale, in y's place."""
    noise = None
    if key is not None:
        noise = uniform(scaled.shape, key, scaled.y.device)
        noise = to_blocks(noise, format.block_size, dim)[0]
    codes = round_to_element_(scaled.y, format.element, format.rounding, noise)
    clamps = format.clips and clamp
    return codes.clamp_(format.element.min, format.element.max) if clamps else codes


def saturated(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values that would overflow `dtype` become its largest finite number, in place."""
    limit = min(torch.finfo(dtype).max, torch.finfo(values.dtype).max)
    return values.clamp_(-limit, limit)


def _working_dtype(x: Tensor, format: BlockFormat) -> torch.dtype:
    """BF16 means the same bits there and half the traffic, not less precision."""
    exact = format.scale is ScaleFormat.E8M0 and format.rounding is Rounding.NEAREST
    exact = exact and format.arithmetic is Arithmetic.FP32
    return torch.bfloat16 if exact and x.dtype is torch.bfloat16 else torch.float32


def _quotient(x: Tensor, divisor: Tensor, format: BlockFormat) -> Tensor:
    if format.arithmetic is Arithmetic.BF16:
        return round_to_bf16(x / round_to_bf16(divisor))
    return x / divisor
