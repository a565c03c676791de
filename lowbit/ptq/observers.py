"""Which scales the blocks of a weight get: from the largest magnitude, or the least error.

| search | candidates                                                              | error      |
|--------|-------------------------------------------------------------------------|------------|
| absmax | the format's own scale                                                  | -          |
| before | 1 - 0.008 i of the exact scale, i < 100; the best is cast (FP-Quant)    | |x - x̂|^2.4|
| after  | what the scale format holds around its own: E4M3 an octave down and two | h (x - x̂)² |
|        | up, E8M0 one octave either way; FP32, BF16 the 100 above, each cast     |            |

h is the importance of an input, the diagonal of the Hessian XᵀX, or 1. A scale cast after the
search can be far from what was found, an octave for E8M0, which `after` avoids.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from lowbit.definition.blocks import to_blocks
from lowbit.definition.given import Scales
from lowbit.definition.rounding import round_to_bf16, round_to_element_
from lowbit.definition.scale import block_amax, over
from lowbit.formats import BlockFormat, FloatFormat, Rounding, ScaleFormat, ScaleRule
from lowbit.quantize import QuantizedTensor, quantize

_STEPS = [1 - 0.008 * i for i in range(100)]
_CHUNK = 1 << 22  # values whose candidates are tried at a time


class Search(Enum):
    """Among which scales."""

    ABSMAX = "absmax"
    BEFORE = "before"
    AFTER = "after"


@dataclass(frozen=True)
class Observer:
    """How scales are chosen; `check` raises ValueError for what a format has no meaning for."""

    search: Search = Search.ABSMAX
    reach: float | None = None
    """What the largest magnitude of a block is scaled to: the format's own rule, or a number, for
    FP32 and BF16 scales (FP-Quant's INT4: 7.5, which rounds to 8 and is clipped)."""
    four_thirds: bool = False
    """E8M0 scales 2^floor(log2 amax) under a tensor scale of 1/3: FP-Quant's MXFP4."""

    def check(self, format: BlockFormat) -> None:
        """ValueError for a format that scales cannot be chosen for like this."""
        if not isinstance(format.block_size, int) or format.rounding is Rounding.STOCHASTIC:
            raise ValueError(f"{format}: scales are searched for 1-D blocks, rounded to nearest")
        linear = format.scale in (ScaleFormat.FP32, ScaleFormat.BF16)
        if self.reach is not None and not (linear and self.reach > 0):
            raise ValueError(f"reach={self.reach}: a positive number for FP32 or BF16 scales")
        fits = format.scale == ScaleFormat.E8M0 and isinstance(format.element, FloatFormat)
        if self.four_thirds and (not fits or format.element.max != 6.0):
            raise ValueError(f"four_thirds: of mxfp4 alone, not of {format}")


def observe(
    x: Tensor, format: BlockFormat, observer: Observer, importance: Tensor | None = None
) -> Scales:
    """Scales of the blocks of `x` [..., in] along the last axis; `importance` [in], not negative,
    weighs the errors of search `after`. Where no candidate is better, the format's own.
    """
    observer.check(format)
    own = _own(x, format, observer)
    if observer.search is Search.ABSMAX:
        return Scales(own.scale_values(), own.tensor_scale)
    rows = x.detach().float().reshape(-1, x.shape[-1])
    scale = own.scale.reshape(len(rows), -1)
    per = max(1, _CHUNK // max(1, rows.shape[1]))
    found = [
        _searched(rows[i : i + per], replace(own, scale=scale[i : i + per]), observer, importance)
        for i in range(0, len(rows), per)
    ]
    return Scales(torch.cat(found).reshape(own.scale.shape), own.tensor_scale)


def _own(x: Tensor, format: BlockFormat, observer: Observer) -> QuantizedTensor:
    """`x` under the scales that the search starts from; their codes alone matter."""
    if observer.four_thirds:
        floor = quantize(x, replace(format, scale_rule=ScaleRule.FLOOR))
        byte = (floor.scale.int() + 2).clamp(max=254).to(torch.uint8)  # 2^floor(log2 amax)
        return replace(floor, scale=byte, tensor_scale=torch.tensor(1 / 3, device=x.device))
    own = quantize(x, format)
    if observer.reach is not None:
        blocks, inside = to_blocks(x.detach().float(), format.block_size, -1)
        scale = over(block_amax(blocks, inside).squeeze(inside[0]), observer.reach)
        own = replace(own, scale=torch.where(scale == 0, 1.0, scale).to(own.scale.dtype))
    return own


def _searched(
    rows: Tensor, own: QuantizedTensor, observer: Observer, importance: Tensor | None
) -> Tensor:
    """The best scale of each block of some rows, FP32 [rows, blocks]."""
    blocks, _ = to_blocks(rows, own.format.block_size, -1)
    weight = None
    if importance is not None and observer.search is Search.AFTER:
        weight, _ = to_blocks(importance.float()[None], own.format.block_size, -1)
    power = 2.0 if observer.search is Search.AFTER else 2.4
    best = own.scale_values()
    least = torch.full_like(best, torch.inf)
    for kept, tried in _candidates(blocks, own, observer.search):
        product = tried if own.tensor_scale is None else tried * own.tensor_scale
        found = _error(blocks, product, own.format, weight, power)
        better = (found < least) & (kept > 0) & kept.isfinite()
        best, least = torch.where(better, kept, best), torch.where(better, found, least)
    return best


def _candidates(
    blocks: Tensor, own: QuantizedTensor, search: Search
) -> Iterator[tuple[Tensor, Tensor]]:
    """(the scale that is kept, the one whose error counts), the format's own first."""
    start = own.scale_values()
    if search is Search.BEFORE:
        exact = over(block_amax(blocks, (2,)).squeeze(2), own.format.element.max)
        above = own.tensor_scale
        exact = exact if above is None else exact / above
        for step in _STEPS:
            yield _cast(exact * step, own), exact * step
    elif own.scale.dtype is torch.uint8:  # codes, whose neighbours are its neighbours
        reach = (-1, 1) if own.format.scale == ScaleFormat.E8M0 else (*range(-1, -9, -1), 1, 2)
        for step in (0, *reach):
            code = (own.scale.int() + step).clamp(0, 255).to(torch.uint8)
            value = replace(own, scale=code).scale_values()
            yield value, value
    else:
        for step in _STEPS:
            value = _cast(start * step, own)
            yield value, value


def _cast(scale: Tensor, own: QuantizedTensor) -> Tensor:
    """Exact scales as the format stores them: by its own rule, of blocks of one value."""
    if own.format.scale == ScaleFormat.FP32:
        return torch.where(scale == 0, 1.0, scale)
    if own.format.scale == ScaleFormat.BF16:
        return round_to_bf16(torch.where(scale == 0, 1.0, scale))
    if own.format.scale == ScaleFormat.E8M0:
        amax = scale * own.format.element.max
        return quantize(amax, replace(own.format, block_size=1)).scale_values()
    table = replace(own, scale=torch.arange(1, 256).to(torch.uint8)).scale_values()
    held = table[table.isfinite() & (table > 0)].sort().values.to(scale.device)
    above = torch.searchsorted(held, scale).clamp(max=len(held) - 1)
    below = (above - 1).clamp(min=0)
    up = (held[above] - scale).abs() < (scale - held[below]).abs()
    return torch.where(up, held[above], held[below])


def _error(
    blocks: Tensor, product: Tensor, format: BlockFormat, weight: Tensor | None, power: float
) -> Tensor:
    """Of rounding [rows, blocks, values] to multiples of `product`, summed over each block."""
    product = product.unsqueeze(2)
    codes = round_to_element_(blocks / product, format.element, format.rounding)
    codes = codes.clamp_(format.element.min, format.element.max)
    error = codes.mul_(product).sub_(blocks)
    error = error.square_() if power == 2 else error.abs_().pow_(power)
    return (error if weight is None else error.mul_(weight)).sum(2)
