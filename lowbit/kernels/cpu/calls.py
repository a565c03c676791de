"""The C++ quantizer and the integer product behind the operators of operators.py, for CPUs."""

import ctypes
import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.kernels.cpu.library import Format, Job, Product, library
from lowbit.kernels.layout import (
    BITS,
    LEAST,
    Layout,
    block_of,
    element_and_scale,
    empty_both,
    layout,
    tensor_range,
    two_formats,
    without_gaps,
)

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_CHUNK = 1024  # values
_LONGEST = 131_008  # values: products of -128 add up to less than 2^31; whole vectors
_SERIAL = 1 << 15  # values; waking other threads costs more than quantizing so few
#: whether oneDNN's BF16 product takes much longer for a transposed view: with AMX by half
TRANSPOSING_PAYS = bool(torch.cpu.get_capabilities().get("amx_bf16"))


@lru_cache(maxsize=1024)
def c_format(description: tuple[float, ...], limit: float) -> Format:
    """The C struct of `Request.description`, whose values saturate at `limit`."""
    kinds = [field[1] for field in Format._fields_[:-1]]
    known = element_and_scale([*description])[:-1]  # whether a tensor scale is above: not in C
    values = [
        value if kind is ctypes.c_float else int(value)
        for kind, value in zip(kinds, known, strict=True)
    ]
    return Format(*values, limit)


def threads_for(x: Tensor) -> int:
    """How many threads read `x`: PyTorch's number, one for a small tensor."""
    return torch.get_num_threads() if x.numel() > _SERIAL else 1


def job_over(x: Tensor, seen: Layout) -> Job:
    """Read `x` as `seen`."""
    return Job(x.data_ptr(), None, None, None, *seen, seen.columns)


def job_of(
    x: Tensor,
    out: Tensor,
    axes: tuple[tuple[int, ...], int],
    format: list[float],
    scale: tuple[Tensor | None, bool],
    noise: tuple[Tensor | None, Tensor | None],
) -> Job:
    """`axes` are the sizes in the order in which they lie, and the blocked one of them."""
    job = job_over(x, layout(*axes, block_of(format)))
    job.out = out.data_ptr()
    if scale[0] is not None:
        job.tensor_scale, job.apply_tensor_scale = scale[0].data_ptr(), scale[1]
        of_lines = 0 if scale[0].dim() == 0 else 1 if axes[1] == len(axes[0]) - 1 else 2
        job.scale_lines = of_lines
    if noise[0] is not None and noise[1] is not None:
        job.segment = x.shape[-1]
        job.key, job.first_row = int(noise[0]), int(noise[1])
    return job


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
    x, out, job = _whole(x, format, dim, dtype, (state, first_row))
    _run(job, format, limit, x, dtype)
    return out


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
    """Operator `lowbit::quantize_scaled`: with the tensor scale, in two reads.

    The first keeps what both need, the largest magnitude of each block.
    """
    x, out, job = _whole(x, format, dim, dtype, (state, first_row))
    block_rows, blocks = -(-job.rows // job.block_rows), -(-job.columns // job.block_columns)
    amax = x.new_empty(job.outer * block_rows * blocks, dtype=BITS[x.dtype])
    job.amax, job.apply_tensor_scale = amax.data_ptr(), apply
    above = _scale_above(job, x, *tensor_range(format))
    _run(job, format, limit, x, dtype)
    return out, above


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
    """Operator `lowbit::quantize_rows`: under the scale of each line along `dim`, not applied."""
    x, out, job = _whole(x, format, dim, dtype, (state, first_row), above)
    _run(job, format, limit, x, dtype)
    return out


def tensor_scale(x: Tensor, most: float, least: float = LEAST) -> Tensor:
    """Operator `lowbit::tensor_scale`: scale.py's; `most` is 448 x the element's max for E4M3."""
    x, _ = without_gaps(x, by_position=False)
    return _scale_above(job_over(x, Layout(1, 1, x.numel(), 1, _CHUNK)), x, most, least)


def _whole(
    x: Tensor,
    format: list[float],
    dim: int,
    dtype: torch.dtype,
    noise: tuple[Tensor | None, Tensor | None],
    above: Tensor | None = None,
) -> tuple[Tensor, Tensor, Job]:
    """`x` without gaps, where its values go, and the job."""
    x, order = without_gaps(x, by_position=noise[0] is not None or len(block_of(format)) == 2)
    out = torch.empty_like(x, dtype=dtype)
    axes = tuple(x.shape[axis] for axis in order), order.index(dim)
    lying = None if above is None else above.permute(order).contiguous()
    return x, out, job_of(x, out, axes, format, (lying, False), noise)


def _run(job: Job, format: list[float], limit: float, x: Tensor, dtype: torch.dtype) -> None:
    library().lowbit_quantize(
        ctypes.byref(c_format(tuple(format), limit)),
        *(ctypes.byref(job), TYPES[x.dtype], TYPES[dtype], threads_for(x)),
    )


def _scale_above(job: Job, x: Tensor, most: float, least: float) -> Tensor:
    scale = x.new_empty((), dtype=torch.float32)
    job.tensor_scale = scale.data_ptr()
    library().lowbit_tensor_scale(ctypes.byref(job), TYPES[x.dtype], threads_for(x), most)
    return scale.clamp_(min=least) if least > LEAST else scale


def quantize_both(
    x: Tensor,
    formats: list[float],
    dtypes: list[torch.dtype],
    limits: list[float],
    tensor_scales: list[Tensor | None],
    noise: list[Tensor | None],
) -> tuple[Tensor, Tensor]:
    """Operator `lowbit::quantize_both`: the second result lies transposed."""
    x = x.contiguous()
    outs = empty_both(x, dtypes)
    arguments: list[Any] = []
    for i, (out, format) in enumerate(zip(outs, two_formats(formats), strict=True)):
        pair = noise[2 * i], noise[2 * i + 1]
        job = job_of(x, out, (x.shape, 1 - i), format, (tensor_scales[i], False), pair)
        job.transposed = i
        arguments += [ctypes.byref(c_format(tuple(format), limits[i])), ctypes.byref(job)]
    types = (TYPES[dtype] for dtype in (x.dtype, *dtypes))
    library().lowbit_quantize_both(*arguments, *types, threads_for(x))
    return outs[0], outs[1]


def codes(
    x: Tensor,
    format: list[float],
    dim: int,
    tensor_scale: Tensor | None,
    state: Tensor | None,
    first_row: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Operator `lowbit::codes`: INT8 codes and FP32 scales, the blocked axis last."""
    x = x.contiguous()
    codes, scales = empty_codes(x, format, dim)
    job = job_of(x, codes, (x.shape, dim), format, (tensor_scale, False), (state, first_row))
    job.transposed = 1 - dim
    job.scales = scales.data_ptr()
    _run(job, format, math.inf, x, torch.int8)
    return codes, scales if dim == 1 else scales.t()


def empty_codes(x: Tensor, format: list[float], dim: int, *_: Any) -> tuple[Tensor, Tensor]:
    """Where `codes` writes both."""
    rows, depth = x.shape if dim == 1 else x.shape[::-1]
    (size,) = block_of(format)
    blocks = 1 if size == -1 else -(-depth // size)
    shape = (rows, blocks) if dim == 1 else (blocks, rows)
    return x.new_empty(rows, depth, dtype=torch.int8), x.new_empty(shape, dtype=torch.float32)


def integer_matmul(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, dtype: torch.dtype
) -> Tensor:
    """Operator `lowbit::integer_matmul`."""
    a, a_scales, b, b_scales = *_shorter(a, a_scales), *_shorter(b, b_scales)
    out = a.new_empty(a.shape[0], b.shape[0], dtype=dtype)
    blocks = a_scales.shape[1]
    product = Product(
        *(t.data_ptr() for t in (a, b, a_scales, b_scales, out)),
        *(*out.shape, blocks, a.shape[1] // blocks, *a_scales.stride(), *b_scales.stride()),
        *(dtype is torch.bfloat16, torch.get_num_threads()),
    )
    if library().lowbit_integer_matmul(ctypes.byref(product)):
        raise RuntimeError("the system does not let this process use the matrix unit (AMX)")
    return out


def _shorter(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks whose INT32 sums could wrap, as several of the same scale."""
    blocks = scales.shape[1]
    size = codes.shape[1] // blocks
    if size <= _LONGEST:
        return codes, scales
    parts = -(-size // _LONGEST)
    part = -(-size // parts // 64) * 64
    padded = F.pad(codes.reshape(-1, blocks, size), (0, parts * part - size))
    return padded.flatten(1), scales.repeat_interleave(parts, 1)
