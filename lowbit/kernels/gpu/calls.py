"""The Triton quantizer behind the operators of operators.py, for CUDA devices."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lowbit.definition.scale import over
from lowbit.kernels.gpu import quantize as gpu_quantize
from lowbit.kernels.layout import (
    BITS,
    LEAST,
    block_of,
    element_and_scale,
    empty_both,
    layout,
    tensor_range,
    two_formats,
    without_gaps,
)

_INTEGERS = 0, 1, 2, 5, 6, 7, 9, 10, 11, 13, 14  # of those that describe a format
VALUES_A_WARP = 1024  # 32 a thread; measured on an H100, as _tile_of's 32 x 64 is


def quantize(
    x: Tensor,
    format: list[float],
    dim: int,
    dtype: torch.dtype,
    limit: float,
    state: Tensor | None,
    first_row: Tensor | None,
) -> Tensor:
    """Operator `lowbit::quantize`."""
    return _quantized(x, format, dim, dtype, limit, (None, False), (state, first_row))


def quantize_scaled(
    x: Tensor,
    format: list[float],
    dim: int,
    dtype: torch.dtype,
    limit: float,
    apply: bool,
    state: Tensor | None,
    first_row: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Operator `lowbit::quantize_scaled`: with the tensor scale."""
    above = tensor_scale(x, *tensor_range(format))
    noise = state, first_row
    return _quantized(x, format, dim, dtype, limit, (above, apply), noise), above


def quantize_rows(
    x: Tensor,
    format: list[float],
    dim: int,
    dtype: torch.dtype,
    limit: float,
    above: Tensor,
    state: Tensor | None,
    first_row: Tensor | None,
) -> Tensor:
    """Operator `lowbit::quantize_rows`."""
    return _quantized(x, format, dim, dtype, limit, (above, False), (state, first_row))


def _quantized(
    x: Tensor,
    format: list[float],
    dim: int,
    dtype: torch.dtype,
    limit: float,
    scale: tuple[Tensor | None, bool],
    noise: tuple[Tensor | None, Tensor | None],
) -> Tensor:
    block = block_of(format)
    x, order = without_gaps(x, noise[0] is not None or len(block) == 2)
    out = torch.empty_like(x, dtype=dtype)
    dim = order.index(dim)
    above = (
        scale[0]
        if scale[0] is None or scale[0].dim() == 0
        else scale[0].permute(order).contiguous()
    )
    seen = layout(tuple(x.shape[axis] for axis in order), dim, block)
    if len(block) == 1:
        block = (1, *block) if dim == x.dim() - 1 else (*block, 1)
    rows, columns = block
    tile = _tile_of(rows, columns)
    grid = (seen.outer * _tiles(seen.rows, tile[0]) * _tiles(seen.columns, tile[1]),)
    with _device_of(x):
        gpu_quantize.quantize[grid](
            *(_bits(x), _bits(out), above, seen.rows, seen.columns, limit, x.shape[-1]),
            *(
                *map(_number, noise),
                constants(format),
                rows,
                columns,
                *tile,
                scale[1],
                dim < x.dim() - 1,
            ),
            **launch_options(tile),
        )
    return out


def quantize_both(
    x: Tensor,
    formats: list[float],
    dtypes: list[torch.dtype],
    limits: list[float],
    tensor_scales: list[Tensor | None],
    noise: list[Tensor | None],
) -> tuple[Tensor, Tensor]:
    """Operator `lowbit::quantize_both`."""
    x = x.contiguous()
    rows, columns = x.shape
    across, down = empty_both(x, dtypes)
    described = two_formats(formats)
    blocks = [size for format in described for size in block_of(format)]
    tile = _tile_of(blocks[1], blocks[0])
    states, first_rows = map(_number, noise[::2]), map(_number, noise[1::2])
    grid = (_tiles(rows, tile[0]) * _tiles(columns, tile[1]),)
    with _device_of(x):
        gpu_quantize.quantize_both[grid](
            *(_bits(x), _bits(across), _bits(down), *tensor_scales, rows, columns, *limits),
            *(*states, *first_rows, *map(constants, described), *blocks, *tile),
            **launch_options(tile),
        )
    return across, down


def tensor_scale(x: Tensor, most: float, least: float = LEAST) -> Tensor:
    """Operator `lowbit::tensor_scale`."""
    x, _ = without_gaps(x, by_position=False)
    amax = x.new_zeros((), dtype=torch.int32)
    size = 4096
    with _device_of(x):
        gpu_quantize.finite_amax[(_tiles(x.numel(), size),)](_bits(x), amax, x.numel(), size)
    return over(amax.view(torch.float32), most).clamp_(min=least)


def _device_of(x: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device."""
    guard: AbstractContextManager[None] = torch.cuda.device_of(x)  # type: ignore[no-untyped-call]  # torch's
    return guard


def _tile_of(rows: int, columns: int) -> tuple[int, int]:
    """What one program reads: 32 x 64 or whole blocks; of very large ones, one."""
    wider = max(rows, 32), max(columns, 64)
    return wider if wider[0] * wider[1] <= 1 << 14 else (rows, columns)


def launch_options(tile: tuple[int, int]) -> dict[str, Any]:
    """No contraction to FMA, and warps for the values of a tile."""
    warps = min(max(tile[0] * tile[1] // VALUES_A_WARP, 1), 16)
    return {"enable_fp_fusion": False, "num_warps": warps}


def _tiles(length: int, size: int) -> int:
    return -(-length // size)


def _bits(x: Tensor) -> Tensor:
    return x.view(BITS[x.dtype])


def _number(x: Tensor | None) -> int:
    return 0 if x is None else int(x)


def constants(format: list[float]) -> tuple[float, ...]:
    """The format as the kernels know it; CARRY as far as a mantissa reaches."""
    numbers = [int(v) if i in _INTEGERS else v for i, v in enumerate(element_and_scale(format))]
    numbers[7] = min(numbers[7], 2**23 - 1)
    return tuple(numbers)
