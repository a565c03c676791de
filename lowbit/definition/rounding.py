"""Rounding scaled values to the grid of an element format."""

import torch
from torch import Tensor

from lowbit.kinds.elements import IntFormat, Minifloat
from lowbit.kinds.rules import Rounding

_INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
_EXPONENT = {torch.float32: 0x7F80_0000, torch.bfloat16: 0x7F80}


def round_to_bf16(x: Tensor) -> Tensor:
    """FP32 rounded to the nearest BF16, kept in FP32; too large becomes infinite.

    On the bits, since compilers drop a cast to BF16 and back.
    """
    bits = x.view(torch.int32)
    bits = bits + 0x7FFF + (bits >> 16 & 1) & ~0xFFFF
    return torch.where(x.isnan(), x, bits.view(torch.float32))


def round_to_element_(
    y: Tensor,
    element: IntFormat | Minifloat,
    rounding: Rounding = Rounding.NEAREST,
    noise: Tensor | float | None = None,
) -> Tensor:
    """`y` (FP32 or BF16) on the unbounded grid of `element`: steps of one for integers, of an ulp,
    never below the subnormals', for floats. NaN stays NaN. In place, since fresh memory costs more
    than the rounding.

    Only STOCHASTIC uses `noise`, uniform in [0, 1): away from zero under 0, towards it under 1.
    """
    match element:
        case IntFormat():
            return _round_(y, rounding, noise)
        case Minifloat(mantissa_bits=mantissa_bits):
            # clearing all bits but the exponent's leaves 2^floor(log2 |y|)
            binade = (y.view(_INTEGER[y.dtype]) & _EXPONENT[y.dtype]).view(y.dtype)
            ulp = binade.clamp_(min=2.0**element.min_exponent).mul_(2.0**-mantissa_bits)
            return _round_(y.div_(ulp), rounding, noise).mul_(ulp)


def _round_(y: Tensor, rounding: Rounding, noise: Tensor | float | None) -> Tensor:
    if rounding is Rounding.NEAREST:
        return y.round_()
    whole = y.trunc()
    remainder = (y - whole).abs()  # exact, where y + 0.5 or y + noise would round
    if rounding is Rounding.HALF_AWAY:
        up = remainder >= 0.5
    else:
        assert noise is not None
        up = remainder > noise
    return whole.add_(up.to(y.dtype).copysign(y))
