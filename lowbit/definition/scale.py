"""The scale of each block, from its largest magnitude; in FP32 with exact exponents."""

import math

import torch
from torch import Tensor

from lowbit.definition.rounding import round_to_bf16, round_to_element_
from lowbit.formats import (
    Arithmetic,
    BlockFormat,
    OuterScale,
    Rounding,
    ScaleFormat,
    ScaleRounding,
    ScaleRule,
)

NAN_BYTE = 255  # of E8M0
_LEAST, _GREATEST = 1 << 22, 254 << 23  # 2^-127 and 2^127 as bits of FP32
_EXPONENT = 255 << 23  # the exponent field; infinity as bits, where NaNs start as well
_INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
_MAGNITUDE = {torch.float32: 0x7FFF_FFFF, torch.bfloat16: 0x7FFF}


def block_amax(blocks: Tensor, inside: tuple[int, ...]) -> Tensor:
    """Largest magnitude of each block, FP32, kept dims; NaN or Inf where a block holds one.

    The bit patterns of magnitudes order like the magnitudes, with Inf and NaN on top, and integer
    maxima are several times faster than floating-point ones.
    """
    bits = blocks.view(_INTEGER[blocks.dtype]) & _MAGNITUDE[blocks.dtype]
    return bits.amax(inside, keepdim=True).view(blocks.dtype).float()


def power_of_two(byte: Tensor) -> Tensor:
    """The values of E8M0 bytes: 2^(byte - 127) in FP32, exactly; NaN for 255."""
    bits = (byte.to(torch.int32) << 23).clamp_(min=_LEAST)
    return torch.where(byte == NAN_BYTE, math.nan, bits.view(torch.float32))


def inverse(scale: Tensor) -> Tensor:
    """1 / scale for powers of two, exactly, on the bits: GPUs divide by subnormals inexactly."""
    bits = (_GREATEST + _LEAST - scale.view(torch.int32)) & _EXPONENT
    return torch.where(scale.isnan(), math.nan, bits.clamp_(min=_LEAST).view(torch.float32))


def over(amax: Tensor, number: float) -> Tensor:
    """amax / number, correctly rounded: by a plain number, CUDA multiplies by its reciprocal."""
    return amax / amax.new_full((), number)


def e8m0_scale(amax: Tensor, format: BlockFormat) -> Tensor:
    """A power of two from 2^-127 to 2^127, FP32; 2^-127 where `amax` is 0, NaN where not finite."""
    bits = amax.view(torch.int32)
    finite = bits < _EXPONENT
    if format.arithmetic is Arithmetic.BF16:
        byte = _bf16_exponent(torch.where(finite, amax, 1.0), format) + 127
    else:
        byte = _exact_byte(bits, format)
    bits = (byte.clamp_(0, NAN_BYTE - 1) << 23).clamp_(min=_LEAST)
    return torch.where(finite, bits.view(torch.float32), math.nan)


def _exact_byte(amax_bits: Tensor, format: BlockFormat) -> Tensor:
    """127 + floor(log2 amax) - floor(log2 max), one more where the mantissa of amax, its 23 bits,
    is above what the rule lets pass: adding the rest to the next binade carries.
    """
    max_mantissa, max_exponent = math.frexp(format.element.max)
    match format.scale_rule:
        case ScaleRule.RCEIL | ScaleRounding.BEST:
            passes = int((2 * max_mantissa - 1) * 2**23)
        case ScaleRule.CEIL:
            passes = 0
        case ScaleRule.EVEN:  # what rounds up to the next binade does not
            passes = 2**23 - 2 ** (22 - format.element.mantissa_bits) - 1
        case _:
            passes = 2**23 - 1
    byte = (amax_bits + (2**23 - 1 - passes) >> 23) - (max_exponent - 1)
    if max_exponent == 1:  # the two least scales part among the subnormals, whose one is not hidden
        byte = torch.where(amax_bits > 2**22 + passes // 2, byte, 0)
    return byte


def _bf16_exponent(amax: Tensor, format: BlockFormat) -> Tensor:
    """The same rules with quotient and log2 rounded to BF16: a scale may come out one too small."""
    emax = math.frexp(format.element.max)[1] - 1
    match format.scale_rule:
        case ScaleRule.RCEIL:
            exponent = round_to_bf16(round_to_bf16(over(amax, format.element.max)).log2()).ceil()
        case ScaleRule.CEIL:
            exponent = round_to_bf16(amax.log2()).ceil() - emax
        case _:
            exponent = round_to_bf16(amax.log2()).floor() - emax
    return exponent.clamp(-127, 127).to(torch.int32)  # log2(0) is -inf


def finite_amax(x: Tensor, dim: int | None = None) -> Tensor:
    """The largest finite magnitude, FP32, of all values or of each line along `dim`, which stays
    with length 1; 0 where there is none.
    """
    if not x.numel():
        shape = (
            [] if dim is None else [1 if a == dim % x.dim() else n for a, n in enumerate(x.shape)]
        )
        return x.new_zeros(shape, dtype=torch.float32)
    magnitude = torch.where(x.isfinite(), x.abs(), 0.0)
    return (magnitude.amax() if dim is None else magnitude.amax(dim, keepdim=True)).float()


def outer_scale(x: Tensor, format: BlockFormat, dim: int) -> Tensor | None:
    """The FP32 scale above minifloat block scales, finite amax / (448 max) for E4M3: of the tensor,
    a scalar, or of each line along `dim`, kept with length 1; None where there is none.

    At least 2^-117: its product with the smallest block scale is then a normal number.
    """
    if format.outer is OuterScale.NONE:
        return None
    amax = finite_amax(x, dim if format.outer is OuterScale.ROW else None)
    least = max(2.0**-117, 2.0**-126 / format.scale.smallest)
    return over(amax, format.most_scale * format.element.max).clamp(min=least)


def block_scales(amax: Tensor, format: BlockFormat, above: Tensor | None) -> tuple[Tensor, ...]:
    """The scale of each block, FP32, NaN where `amax` is not finite; or the two of which the rule
    takes the one with the lesser error, the first where both have the same.
    """
    if format.scale == ScaleFormat.E8M0:
        up = e8m0_scale(amax, format)
        if format.scale_rule is not ScaleRounding.BEST:
            return (up,)
        reaches = amax == up * format.element.max
        return up, torch.where(reaches, up, (up / 2).clamp_(min=2.0**-127))
    ratio = over(torch.where(amax.isfinite(), amax, math.nan), format.element.max)
    if above is not None:
        ratio = ratio / above
    match format.scale_rule:
        case ScaleRounding.UP:
            return (_rounded(ratio, format, *UP),)
        case ScaleRounding.BEST:
            return _rounded(ratio, format, *UP), _rounded(ratio, format, *DOWN)
        case ScaleRounding.FOUR_OVER_SIX:
            return _rounded(ratio, format), _rounded(ratio * 1.5, format)
    return (_rounded(ratio, format),)


UP, DOWN = (Rounding.STOCHASTIC, 0.0), (Rounding.STOCHASTIC, 1.0)  # whatever the remainder is


def _rounded(
    ratio: Tensor, format: BlockFormat, rounding: Rounding = Rounding.NEAREST, noise: float = 0.0
) -> Tensor:
    """Ratios, which are not negative, as scales of this format: minifloats never as zero; others
    as 1 where they are zero.
    """
    scale = format.scale
    if scale.is_minifloat:
        within = ratio.clamp(format.least_scale, scale.max)
        return round_to_element_(within, scale, rounding, noise)
    if scale == ScaleFormat.BF16:
        if rounding is Rounding.NEAREST:
            ratio = round_to_bf16(ratio)
        else:
            bits = ratio.view(torch.int32) + (0xFFFF if noise == 0 else 0) & ~0xFFFF
            ratio = torch.where(ratio.isnan(), ratio, bits.view(torch.float32))
        ratio = ratio.clamp(max=scale.max)
    return torch.where(ratio == 0, 1.0, ratio)
