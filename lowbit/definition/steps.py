"""The definition's two steps, blocks divided by their scales and quotients rounded, in PyTorch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.definition import owners
from lowbit.definition.blocks import to_blocks
from lowbit.definition.noise import Key, uniform
from lowbit.definition.rounding import round_to_bf16, round_to_element_
from lowbit.definition.scale import (
    block_amax,
    block_scales,
    finite_amax,
    inverse,
    outer_scale,
)
from lowbit.formats import Arithmetic, BlockFormat, Rounding, ScaleFormat


@dataclass(frozen=True)
class Scaled:
    """A tensor in blocks, divided by its scales."""

    y: Tensor  #: the quotient; BF16 where every step on BF16 input is exact in it, else FP32
    scale: Tensor  #: FP32, of each block
    tensor_scale: Tensor | None  #: a scalar, or as the tensor with one value along its lines
    inside: tuple[int, ...]  #: axes of `y` inside a block
    shape: tuple[int, ...]  #: of the tensor that was blocked
    factor: Tensor | None = None  #: an owner's arithmetic: of codes, the tensor's scale within

    @property
    def product(self) -> Tensor:
        """What codes are multiplied with in all, FP32, of each block."""
        if self.factor is not None:
            return self.factor
        above = over_blocks(self.tensor_scale, self.inside)
        return self.scale if above is None else self.scale * above


def scaled_blocks(x: Tensor, format: BlockFormat, dim: int) -> Scaled:
    """`x` over the scales of its blocks along `dim`."""
    matrix = x.detach().reshape(x.shape or (1,)).to(_working_dtype(x, format))
    if format.arithmetic is Arithmetic.BF16:
        matrix = round_to_bf16(matrix)
    blocks, inside = to_blocks(matrix, format.block_size, dim)
    if format.arithmetic.is_owners:
        return _owned_blocks(matrix, blocks, inside, format, x.dtype)
    outer = outer_scale(matrix, format, dim)
    above = over_blocks(outer, inside)
    scale, *others = block_scales(block_amax(blocks, inside), format, above)
    for other in others:
        errors = [_squared_error(blocks, inside, each, format, above) for each in (scale, other)]
        scale = torch.where(errors[1] < errors[0], other, scale)
    if outer is not None and x.dim() == 0:
        outer = outer.reshape(())
    return Scaled(_divided(blocks, scale, format, above), scale, outer, inside, matrix.shape)


def over_blocks(above: Tensor | None, inside: tuple[int, ...]) -> Tensor | None:
    """An outer scale beside the scales of blocks, whose axes are split."""
    return above if above is None or above.dim() == 0 else above.unsqueeze(inside[0])


def _owned_blocks(
    matrix: Tensor, blocks: Tensor, inside: tuple[int, ...], format: BlockFormat, dtype: torch.dtype
) -> Scaled:
    owner, amax = format.arithmetic, block_amax(blocks, inside)
    narrow = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
    above = owners.kept(finite_amax(matrix), owner, narrow)
    amax = torch.where(amax.isfinite(), amax, torch.nan)
    scale = owners.block_scale(amax, above, owner, narrow)
    y = owners.quotient(blocks, scale, above, owner)
    factor = owners.factor(scale, above, owner)
    return Scaled(y, scale, above, inside, matrix.shape, factor)


def _divided(
    blocks: Tensor, scale: Tensor, format: BlockFormat, tensor_scale: Tensor | None
) -> Tensor:
    if format.scale == ScaleFormat.E8M0:
        return blocks * inverse(scale).to(blocks.dtype)
    divisor = scale if tensor_scale is None else scale * tensor_scale
    if format.arithmetic is Arithmetic.BF16:
        return round_to_bf16(blocks / round_to_bf16(divisor))
    return blocks / divisor


def _squared_error(
    blocks: Tensor,
    inside: tuple[int, ...],
    scale: Tensor,
    format: BlockFormat,
    tensor_scale: Tensor | None,
) -> Tensor:
    """Of rounding to nearest under this scale, FP64, of each block; its halves are added up, and
    theirs, an order that does not depend on how the tensor lies.
    """
    codes = round_to_element_(_divided(blocks, scale, format, tensor_scale), format.element)
    values = codes.clamp_(format.element.min, format.element.max).double() * scale
    if tensor_scale is not None:
        values *= tensor_scale
    error = (blocks.double() - values).square_()
    for axis in inside:
        while (size := error.shape[axis]) > 1:
            half = (size + 1) // 2
            error.narrow(axis, 0, size - half).add_(error.narrow(axis, half, size - half))
            error = error.narrow(axis, 0, half)
    return error


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
    exact = format.scale == ScaleFormat.E8M0 and format.rounding is Rounding.NEAREST
    exact = exact and format.arithmetic is Arithmetic.FP32
    return torch.bfloat16 if exact and x.dtype is torch.bfloat16 else torch.float32
