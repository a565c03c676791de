"""The C++ measurements: what quantizing does to a tensor, and the shape of its blocks."""

import ctypes

import torch
from torch import Tensor

from lowbit.kernels.cpu import TYPES, c_format, job_of, job_over, threads_for
from lowbit.kernels.layout import layout, without_gaps
from lowbit.kernels.library import library
from lowbit.kernels.request import Request


def quantization_sums(x: Tensor, dim: int, wanted: Request) -> tuple[float, float, int, int]:
    """Sum of x², of (x - q)², how many of x and of q are not zero; `x` has an axis at least."""
    x, dim = x.detach(), dim % x.dim()
    by_position = wanted.key is not None or isinstance(wanted.format.block_size, tuple)
    x, order = without_gaps(x, by_position)
    above = wanted.tensor_scale(x)
    axes = [x.shape[axis] for axis in order], order.index(dim)
    job = job_of(x, x, axes, wanted.description, (above, above is not None), wanted.noise)
    job.out = None
    sums = (ctypes.c_double * 4)()
    library().lowbit_errors(
        ctypes.byref(c_format(tuple(wanted.description), wanted.limit)),
        *(ctypes.byref(job), TYPES[x.dtype], threads_for(x), ctypes.byref(sums)),
    )
    return sums[0], sums[1], int(sums[2]), int(sums[3])


def crest_factors(x: Tensor, block_size: int, dim: int) -> Tensor:
    """`lowbit.stats.crest_factor`; `x` has an axis at least."""
    x, dim = x.detach().contiguous(), dim % x.dim()
    length = x.shape[dim]
    size = length if block_size == -1 else block_size
    job = job_over(x, layout(list(x.shape), dim, [size]))
    if job.block_rows == 1 and dim == x.dim() - 1:
        job.block_columns = size  # zeros fill a short block
    else:
        job.block_rows = size
    out = x.new_empty(*x.shape[:dim], -(-length // size), *x.shape[dim + 1 :], dtype=torch.float64)
    library().lowbit_crest_factors(
        ctypes.byref(job), TYPES[x.dtype], threads_for(x), ctypes.c_void_p(out.data_ptr())
    )
    return out
