"""The C++ quantizer as `torch.library` operators."""

import ctypes
import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lowbit.kernels.library import Format, Job, Product, library

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_SERIAL = 1 << 15  # values; waking other threads costs more than quantizing so few


@lru_cache(maxsize=1024)
def c_format(description: tuple[float, ...], limit: float) -> Format:
    """The C struct of `Request.description`, whose values saturate at `limit`."""
    kinds = [field[1] for field in Format._fields_[:-1]]
    values = [
        value if kind is ctypes.c_float else int(value)
        for kind, value in zip(kinds, description, strict=False)  # the block comes after them
    ]
    return Format(*values, limit)


def threads_for(x: Tensor) -> int:
    """How many threads read `x`: PyTorch's number, one for a small tensor."""
    return torch.get_num_threads() if x.numel() > _SERIAL else 1


def order_of(x: Tensor) -> list[int]:
    """The axes by falling stride: the order in which the values lie."""
    strides = x.stride()
    return sorted(range(x.dim()), key=lambda axis: (-strides[axis], axis))


def place(job: Job, shape: list[int], dim: int, block: list[int]) -> None:
    """See the tensor as [outer, rows, columns] in 2-D blocks."""
    if len(block) == 2:
        rows, columns = shape[-2:]
        job.block_rows, job.block_columns = min(block[0], rows), min(block[1], columns)
    elif dim == len(shape) - 1:
        rows, columns = math.prod(shape[:-1]), shape[-1]
        job.block_rows, job.block_columns = 1, columns if block[0] == -1 else min(block[0], columns)
    else:
        rows, columns = shape[dim], math.prod(shape[dim + 1 :])
        job.block_rows, job.block_columns = rows if block[0] == -1 else min(block[0], rows), 1
    job.rows, job.columns = rows, columns
    job.outer = math.prod(shape) // (rows * columns)
    job.segment = columns


def job_of(
    x: Tensor,
    out: Tensor,
    axes: tuple[list[int], int],
    format: list[float],
    scale: tuple[Tensor | None, bool],
    noise: tuple[Tensor | None, Tensor | None],
) -> Job:
    """`axes` are the sizes in the order in which they lie, and the blocked one of them."""
    job = Job(x.data_ptr(), out.data_ptr())
    place(job, *axes, [int(size) for size in format[10:]])
    if scale[0] is not None:
        job.tensor_scale, job.apply_tensor_scale = scale[0].data_ptr(), scale[1]
    if noise[0] is not None and noise[1] is not None:
        job.segment = x.shape[-1]
        job.key, job.first_row = int(noise[0]), int(noise[1])
    return job


def _quantize(
    x: Tensor,
    format: list[float],
    dim: int,
    dtype: torch.dtype,
    limit: float,
    tensor_scale: Tensor | None,
    apply: bool,
    state: Tensor | None,
    first_row: Tensor | None,
) -> Tensor:
    order = list(range(x.dim()))
    if not x.is_contiguous():
        order = order_of(x)
        two_d = len(format) > 11
        if state is not None or two_d or not x.permute(order).is_contiguous():
            x, order = x.contiguous(), list(range(x.dim()))
    out = torch.empty_like(x, dtype=dtype)
    axes = [x.shape[axis] for axis in order], order.index(dim)
    job = job_of(x, out, axes, format, (tensor_scale, apply), (state, first_row))
    library().lowbit_quantize(
        ctypes.byref(c_format(tuple(format), limit)),
        *(ctypes.byref(job), TYPES[x.dtype], TYPES[dtype], threads_for(x)),
    )
    return out


def _quantize_both(
    x: Tensor,
    formats: list[float],
    dtypes: list[torch.dtype],
    limits: list[float],
    tensor_scales: list[Tensor | None],
    noise: list[Tensor | None],
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    rows, columns = x.shape
    outs = x.new_empty(rows, columns, dtype=dtypes[0]), x.new_empty(columns, rows, dtype=dtypes[1])
    described = formats[:11], formats[11:]
    arguments: list[Any] = []
    for i, (out, format) in enumerate(zip(outs, described, strict=True)):
        pair = noise[2 * i], noise[2 * i + 1]
        axes = [rows, columns], 1 - i
        job = job_of(x, out, axes, format, (tensor_scales[i], False), pair)
        job.transposed = i
        arguments += [ctypes.byref(c_format(tuple(format), limits[i])), ctypes.byref(job)]
    types = (TYPES[dtype] for dtype in (x.dtype, *dtypes))
    library().lowbit_quantize_both(*arguments, *types, threads_for(x))
    return outs[0], outs[1]


def _codes(
    x: Tensor,
    format: list[float],
    dim: int,
    tensor_scale: Tensor | None,
    state: Tensor | None,
    first_row: Tensor | None,
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    codes, scales = _empty_codes(x, format, dim)
    job = job_of(x, codes, ([*x.shape], dim), format, (tensor_scale, False), (state, first_row))
    job.transposed = 1 - dim
    job.scales = scales.data_ptr()
    library().lowbit_quantize(
        ctypes.byref(c_format(tuple(format), math.inf)),
        *(ctypes.byref(job), TYPES[x.dtype], TYPES[torch.int8], threads_for(x)),
    )
    return codes, scales if dim == 1 else scales.t()


def _empty_codes(x: Tensor, format: list[float], dim: int, *_: Any) -> tuple[Tensor, Tensor]:
    rows, depth = x.shape if dim == 1 else x.shape[::-1]
    blocks = 1 if format[10] == -1 else -(-depth // int(format[10]))
    shape = (rows, blocks) if dim == 1 else (blocks, rows)
    return x.new_empty(rows, depth, dtype=torch.int8), x.new_empty(shape, dtype=torch.float32)


def _integer_matmul(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, dtype: torch.dtype
) -> Tensor:
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


def _tensor_scale(x: Tensor, most: float) -> Tensor:
    """scale.py's tensor_scale; `most` is 448 x the element's max."""
    if not x.permute(order_of(x)).is_contiguous():
        x = x.contiguous()
    bits = library().lowbit_finite_amax(x.data_ptr(), x.numel(), TYPES[x.dtype], threads_for(x))
    amax = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    return (amax / most).clamp_(min=2.0**-117)


def _like(x: Tensor, format: list[float], dim: int, dtype: torch.dtype, *_: Any) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


def _like_both(
    x: Tensor, formats: list[float], dtypes: list[torch.dtype], *_: Any
) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    return x.new_empty(rows, columns, dtype=dtypes[0]), x.new_empty(columns, rows, dtype=dtypes[1])


def _like_scale(x: Tensor, most: float) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


def _like_codes(x: Tensor, format: list[float], dim: int, *_: Any) -> tuple[Tensor, Tensor]:
    codes, scales = _empty_codes(x, format, dim)
    return codes, scales if dim == 1 else scales.t()


def _like_product(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, dtype: torch.dtype
) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


_OPERATORS: dict[str, tuple[Any, Any]] = {
    "quantize(Tensor x, float[] format, int dim, ScalarType dtype, float limit, Tensor? "
    "tensor_scale, bool apply, Tensor? state, Tensor? first_row) -> Tensor": (_quantize, _like),
    "quantize_both(Tensor x, float[] formats, ScalarType[] dtypes, float[] limits, Tensor?[] "
    "tensor_scales, Tensor?[] noise) -> (Tensor, Tensor)": (_quantize_both, _like_both),
    "tensor_scale(Tensor x, float most) -> Tensor": (_tensor_scale, _like_scale),
    "codes(Tensor x, float[] format, int dim, Tensor? tensor_scale, Tensor? state, Tensor? "
    "first_row) -> (Tensor, Tensor)": (_codes, _like_codes),
    "integer_matmul(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, ScalarType dtype) -> "
    "Tensor": (_integer_matmul, _like_product),
}
_library: Any = torch.library.Library("lowbit", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch's
for _schema, (_implementation, _fake) in _OPERATORS.items():
    _name = _schema.split("(")[0]
    _library.define(_schema)
    _library.impl(_name, _implementation, "CPU")
    torch.library.register_fake(f"lowbit::{_name}", _fake, lib=_library)
