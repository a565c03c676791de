"""The scale of each block, from its largest magnitude; in FP32 with exact exponents."""

import math

import torch
from torch import Tensor

from lowbit.formats import E4M3, Arithmetic, BlockFormat, ScaleFormat, ScaleRule
from lowbit.rounding import round_to_bf16, round_to_element

NAN_EXPONENT = 128  # what E8M0 stores as byte 255
_INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
_MAGNITUDE = {torch.float32: 0x7FFF_FFFF, torch.bfloat16: 0x7FFF}


def block_amax(blocks: Tensor, inside: tuple[int, ...]) -> Tensor:
    """Largest magnitude of each block, FP32, kept dims; NaN where a block holds a NaN or an Inf.

    The bit patterns of magnitudes order like the magnitudes, with Inf and NaN on top, and integer
    maxima are several times faster than floating-point ones.
    """
    bits = blocks.view(_INTEGER[blocks.dtype]) & _MAGNITUDE[blocks.dtype]
    amax = bits.amax(inside, keepdim=True).view(blocks.dtype).float()
    return torch.where(amax.isfinite(), amax, math.nan)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in FP32, exactly, for int32 in -127 .. 127; NaN for +-NAN_EXPONENT."""
    bits = torch.where(exponent == -127, 1 << 22, (exponent + 127) << 23)  # 2^-127 is subnormal
    bits = torch.where(exponent.abs() == NAN_EXPONENT, 0x7FC0_0000, bits)
    return bits.to(torch.int32).view(torch.float32)


def e8m0_exponent(amax: Tensor, format: BlockFormat) -> Tensor:
    """The exponent of an E8M0 scale, int32 in -127 .. 127, NAN_EXPONENT where `amax` is NaN."""
    finite = torch.where(amax.isnan(), 1.0, amax)
    if format.arithmetic is Arithmetic.BF16:
        exponent = _bf16_exponent(finite, format)
    else:
        exponent = _exact_exponent(finite, format)
    exponent = torch.where(amax == 0, -127, exponent.clamp(-127, 127))
    return torch.where(amax.isnan(), NAN_EXPONENT, exponent).to(torch.int32)


def _exact_exponent(amax: Tensor, format: BlockFormat) -> Tensor:
    """The rules on amax = mantissa x 2^exponent, mantissa in [1/2, 1); frexp is exact."""
    mantissa, exponent = torch.frexp(amax)
    max_mantissa, max_exponent = math.frexp(format.element.max)
    exponent = exponent - max_exponent  # = floor(log2 amax) - floor(log2 max)
    match format.scale_rule:
        case ScaleRule.RCEIL:
            return exponent + (mantissa > max_mantissa)
        case ScaleRule.CEIL:
            return exponent + (mantissa > 0.5)
        case ScaleRule.EVEN:
            carries = 1 - 0.5 ** (format.element.mantissa_bits + 2)  # rounds up to the next binade
            return exponent + (mantissa >= carries)
        case _:
            return exponent


def _bf16_exponent(amax: Tensor, format: BlockFormat) -> Tensor:
    """The same rules with quotient and log2 rounded to BF16: a scale may come out one too small."""
    emax = math.frexp(format.element.max)[1] - 1
    match format.scale_rule:
        case ScaleRule.RCEIL:
            exponent = round_to_bf16(round_to_bf16(amax / format.element.max).log2()).ceil()
        case ScaleRule.CEIL:
            exponent = round_to_bf16(amax.log2()).ceil() - emax
        case _:
            exponent = round_to_bf16(amax.log2()).floor() - emax
    return exponent.clamp(-127, 127).to(torch.int32)  # log2(0) is -inf


def linear_scale(amax: Tensor, format: BlockFormat) -> Tensor:
    """amax / max rounded to BF16 or FP32; 1 where that is zero."""
    scale = amax / format.element.max
    if format.scale is ScaleFormat.BF16:
        scale = round_to_bf16(scale)
    return torch.where(scale == 0, 1.0, scale)


def tensor_scale(x: Tensor, format: BlockFormat) -> Tensor:
    """The FP32 scale above all E4M3 block scales: finite amax / (448 max).

    At least 2^-117: its product with the smallest block scale is then a normal number.
    """
    magnitude = torch.where(x.isfinite(), x.abs(), 0.0)
    amax = magnitude.amax().float() if x.numel() else x.new_zeros(())
    return (amax / (E4M3.max * format.element.max)).clamp(min=2.0**-117)


def e4m3_scale(amax: Tensor, format: BlockFormat, tensor_scale: Tensor) -> Tensor:
    """amax / max in units of `tensor_scale`, rounded to the nearest E4M3, never to zero."""
    least = E4M3.smallest if format.scale_min is None else format.scale_min
    ratio = (amax / format.element.max / tensor_scale).clamp(least, E4M3.max)
    return round_to_element(ratio, E4M3)
