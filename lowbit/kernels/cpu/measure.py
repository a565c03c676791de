"""The C++ measurements: what quantizing does to a tensor, and the shape of its blocks."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit.kernels.cpu.calls import TYPES, c_format, job_of, job_over, threads_for
from lowbit.kernels.cpu.library import Format, Job, library
from lowbit.kernels.layout import layout, without_gaps
from lowbit.kernels.request import Request

Sums = tuple[float, float, int, int]


def quantization_sums(x: Tensor, dim: int, wanted: Sequence[Request]) -> list[Sums]:
    """Sum of x², of (x - q)², how many of x and of q are not zero; all formats have one block size.

    `x` has an axis at least.
    """
    x, dim = x.detach(), dim % x.dim()
    size = wanted[0].format.block_size
    by_position = isinstance(size, tuple) or any(request.key is not None for request in wanted)
    x, order = without_gaps(x, by_position)
    axes = tuple(x.shape[axis] for axis in order), order.index(dim)
    last = not by_position and order[-1] == dim
    if last and isinstance(size, int) and size != -1 and x.shape[dim] % size == 0:
        axes = (x.numel(),), 0  # rows of whole blocks are one long row
    jobs = (Job * len(wanted))()
    formats = (Format * len(wanted))()
    scales = [
        request.outer_scale(x, dim) for request in wanted
    ]  # kept until the kernel has read them
    for i, (request, above) in enumerate(zip(wanted, scales, strict=True)):
        formats[i] = c_format(tuple(request.description), request.limit)
        scale = above, above is not None
        jobs[i] = job_of(x, x, axes, request.description, scale, request.noise)
        jobs[i].out = None
    sums = (ctypes.c_double * 2 * (len(wanted) + 1))()
    library().lowbit_errors(
        *(ctypes.byref(formats), ctypes.byref(jobs), len(wanted)),
        *(TYPES[x.dtype], threads_for(x), ctypes.byref(sums)),
    )
    (signal, nonzero), *rest = sums
    return [(signal, noise, int(nonzero), int(kept)) for noise, kept in rest]


def crest_factors(x: Tensor, block_size: int, dim: int) -> Tensor:
    """`lowbit.stats.crest_factor`; `x` has an axis at least."""
    x, dim = x.detach().contiguous(), dim % x.dim()
    length = x.shape[dim]
    size = length if block_size == -1 else block_size
    job = job_over(x, layout(x.shape, dim, (size,)))
    if job.block_rows == 1 and dim == x.dim() - 1:
        job.block_columns = size  # zeros fill a short block
    else:
        job.block_rows = size
    out = x.new_empty(*x.shape[:dim], -(-length // size), *x.shape[dim + 1 :], dtype=torch.float64)
    library().lowbit_crest_factors(
        ctypes.byref(job), TYPES[x.dtype], threads_for(x), ctypes.c_void_p(out.data_ptr())
    )
    return out
