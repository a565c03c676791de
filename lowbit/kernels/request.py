"""What is asked of the quantizing operators: plain numbers, which a compiled graph can hold."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from lowbit.definition.noise import Key
from lowbit.definition.scale import outer_scale
from lowbit.formats import (
    BlockFormat,
    FloatFormat,
    OuterScale,
    Rounding,
    ScaleFormat,
    ScaleRounding,
    ScaleRule,
)
from lowbit.kernels import operators as operators  # registers them
from lowbit.kernels.cpu import calls as cpu
from lowbit.kernels.layout import tensor_range

_WIDE = {ScaleFormat.E8M0: 0, ScaleFormat.BF16: 2, ScaleFormat.FP32: 3}  # 1: a minifloat
_OUTERS = [OuterScale.NONE, OuterScale.TENSOR, OuterScale.ROW]
_ROUNDINGS = [Rounding.NEAREST, Rounding.HALF_AWAY, Rounding.STOCHASTIC]


def describe(format: BlockFormat) -> list[float]:
    """What the C++ code knows of a format: `_Format` without the last field, and the block."""
    element = format.element
    is_float = isinstance(element, FloatFormat)
    mantissa, max_exponent = math.frexp(element.max)
    fraction = round((2 * mantissa - 1) * 2**23)
    carry: dict[object, int] = {
        ScaleRule.RCEIL: fraction,
        ScaleRule.CEIL: 0,
        ScaleRule.EVEN: 2**23 - 2 ** (22 - element.mantissa_bits) - 1,
    }
    size = format.block_size
    block = [float(s) for s in size] if isinstance(size, tuple) else [float(size)]
    return [
        *(float(is_float), float(element.mantissa_bits)),
        float(element.min_exponent) if isinstance(element, FloatFormat) else 0.0,
        *(float(element.min), float(element.max)),
        *(float(_WIDE.get(format.scale, 1)), float(max_exponent)),
        float(carry.get(format.scale_rule, 2**23)),
        format.least_scale,
        float(_ROUNDINGS.index(format.rounding)),
        *(float(format.scale.mantissa_bits), float(format.scale.min_exponent), format.scale.max),
        *(float(format.scale_rule is ScaleRounding.UP), float(_OUTERS.index(format.outer))),
        *block,
    ]


_described = lru_cache(maxsize=1024)(describe)


def _operator(name: str, x: Tensor) -> Callable[..., Any]:
    """The function itself where nobody looks on: the dispatcher takes as long as a small job."""
    watched = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    return getattr(torch.ops.lowbit if watched or x.device.type != "cpu" else cpu, name)  # type: ignore[no-any-return]


def as_it_reads(x: Tensor) -> Tensor:
    """`x` detached, its memory holding what it shows: negated views and zeros without memory do
    not.
    """
    x = x.detach()
    if torch.compiler.is_compiling():
        return x
    return x.clone() if x._is_zerotensor() else x.resolve_neg()


@dataclass(frozen=True)
class Request:
    """What to make of a tensor: values of `format`, held in `dtype`."""

    format: BlockFormat
    key: Key | None
    dtype: torch.dtype
    saturates: bool = False  #: at the largest number of `dtype`; else infinite beyond

    @property
    def description(self) -> list[float]:
        described = describe if torch.compiler.is_compiling() else _described
        return described(self.format)

    @property
    def limit(self) -> float:
        return torch.finfo(self.dtype).max if self.saturates else math.inf

    def outer_scale(self, x: Tensor, dim: int) -> Tensor | None:
        """Of NV formats."""
        if self.format.outer is not OuterScale.TENSOR:
            return outer_scale(x, self.format, dim)
        scale: Tensor = _operator("tensor_scale", x)(x, *tensor_range(self.description))
        return scale

    @property
    def noise(self) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if self.key is None else (self.key.state, self.key.first_row)


def quantize(
    x: Tensor, dim: int, wanted: Request, apply: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Values of `x` in blocks along `dim`, and the outer scale; the tensor's is multiplied in where
    `apply`.
    """
    if x.dim() == 0:
        values, above = quantize(x.reshape(1), dim, wanted, apply)
        return values.reshape(()), above if above is None else above.reshape(())
    x, dim = as_it_reads(x), dim % x.dim()
    asked = x, wanted.description, dim, wanted.dtype, wanted.limit
    if wanted.format.outer is OuterScale.NONE:
        return _operator("quantize", x)(*asked, *wanted.noise), None
    if wanted.format.outer is OuterScale.ROW:
        rows = wanted.outer_scale(x, dim)
        return _operator("quantize_rows", x)(*asked, rows, *wanted.noise), rows
    values, above = _operator("quantize_scaled", x)(*asked, apply, *wanted.noise)
    return values, above


def quantize_both(
    x: Tensor, across: Request, down: Request
) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    """The matrix `x` in blocks along its rows, and along its columns: that one lies transposed."""
    x = as_it_reads(x)
    scales = [wanted.outer_scale(x, dim) for wanted, dim in ((across, 1), (down, 0))]
    first, second = _operator("quantize_both", x)(
        *(x, across.description + down.description, [across.dtype, down.dtype]),
        *([across.limit, down.limit], scales, [*across.noise, *down.noise]),
    )
    return (first, scales[0]), (second.t(), scales[1])


def codes(
    x: Tensor, dim: int, format: BlockFormat, key: Key | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """INT8 codes of the matrix `x` with the axis `dim` of the blocks last, scales, outer scale."""
    x = as_it_reads(x)
    wanted = Request(format, key, torch.int8)
    above = wanted.outer_scale(x, dim)
    return *_operator("codes", x)(x, wanted.description, dim, above, *wanted.noise), above
