"""A tensor seen as blocks: each blocked axis split into (blocks, position in the block)."""

import torch
import torch.nn.functional as F
from torch import Tensor

BlockSize = int | tuple[int, int]


def _blocked_axes(x: Tensor, block_size: BlockSize, dim: int) -> list[tuple[int, int]]:
    """(axis, size) of a block, by ascending axis."""
    if isinstance(block_size, tuple):
        if x.ndim < 2:
            raise ValueError(
                f"block_size={block_size} is 2-D, the tensor has shape {tuple(x.shape)}"
            )
        return [(x.ndim - 2, block_size[0]), (x.ndim - 1, block_size[1])]
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim={dim} is not an axis of a tensor of shape {tuple(x.shape)}")
    axis = dim % x.ndim
    return [(axis, max(x.shape[axis], 1) if block_size == -1 else block_size)]


def to_blocks(x: Tensor, block_size: BlockSize, dim: int) -> tuple[Tensor, tuple[int, ...]]:
    """`x` with every blocked axis split in two, and the axes that lie inside a block.

    A view, unless the last block is short: then zeros fill it, which never raise a block's maximum.
    """
    axes = _blocked_axes(x, block_size, dim)
    padding = [0] * (2 * x.ndim)
    for axis, size in axes:
        padding[2 * (x.ndim - 1 - axis) + 1] = -x.shape[axis] % size
    if any(padding):
        x = F.pad(x, padding)
    for axis, size in reversed(axes):
        x = x.reshape(*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])
    return x, tuple(axis + 1 + index for index, (axis, _) in enumerate(axes))


def from_blocks(blocks: Tensor, inside: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """Undo `to_blocks`: merge the split axes and drop the fill."""
    for index, axis in reversed(list(enumerate(inside))):
        size, length = blocks.shape[axis], shape[axis - 1 - index]
        blocks = blocks.flatten(axis - 1, axis)
        whole = length // size * size
        if 0 < whole < length:
            # one slice would do, but Inductor 2.13 runs a loop over 2.5 blocks as one over 2
            # (try_loop_split drops the remainder), leaving the rest unwritten
            rest = blocks.narrow(axis - 1, whole, length - whole)
            blocks = torch.cat([blocks.narrow(axis - 1, 0, whole), rest], axis - 1)
        blocks = blocks.narrow(axis - 1, 0, length)
    return blocks
