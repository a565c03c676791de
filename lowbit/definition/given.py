"""Blocks divided by scales that a caller has chosen."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.definition.blocks import to_blocks
from lowbit.definition.scale import inverse
from lowbit.definition.steps import Scaled
from lowbit.formats import Arithmetic, BlockFormat, ScaleFormat


@dataclass(frozen=True)
class Scales:
    """One scale per block, in the shape in which `QuantizedTensor` has them, and one above all."""

    block: Tensor  #: FP32 values that the scale format holds
    tensor: Tensor | None = None  #: FP32 scalar; any format may have one

    @property
    def product(self) -> Tensor:
        """What a code of each block is a multiple of, FP32."""
        return self.block if self.tensor is None else self.block * self.tensor


def given_blocks(x: Tensor, format: BlockFormat, dim: int, scales: Scales) -> Scaled:
    """`x` over these scales, as `scaled_blocks` divides it by its own; ValueError for a shape that
    is not that of the blocks.
    """
    if format.arithmetic is not Arithmetic.FP32:
        raise ValueError(f"{format}: given scales divide in FP32, not in {format.arithmetic.value}")
    matrix = x.detach().reshape(x.shape or (1,)).float()
    blocks, inside = to_blocks(matrix, format.block_size, dim)
    wanted = [size for axis, size in enumerate(blocks.shape) if axis not in inside]
    if list(scales.block.shape) != wanted:
        raise ValueError(f"scales of shape {tuple(scales.block.shape)}, expected {tuple(wanted)}")
    scale, product = scales.block.float(), scales.product.float()
    for axis in inside:
        scale, product = scale.unsqueeze(axis), product.unsqueeze(axis)
    exact = format.scale == ScaleFormat.E8M0 and scales.tensor is None
    y = blocks * inverse(product) if exact else blocks / product
    return Scaled(y, scale, scales.tensor, inside, matrix.shape)


def check_held(stored: Tensor, given: Tensor, format: BlockFormat) -> None:
    """ValueError unless the stored scales mean the given ones (NaN for NaN)."""
    same = torch.eq(stored, given) | (stored.isnan() & given.isnan())
    if not bool(same.all()):
        wrong = given[~same].flatten()[0].item()
        raise ValueError(f"scale {wrong:g} is no value of {format}'s scales")
