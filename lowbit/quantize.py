"""Quantize a tensor in blocks: the definition that every kernel has to equal bit for bit.

    values = code x block scale (x tensor scale)      code = round(x / scale), saturated

| input                      | result                                                             |
|----------------------------|--------------------------------------------------------------------|
| NaN or Inf in a block      | the whole block is NaN, no other block changes                     |
| all-zero block             | zeros, signs kept; the E8M0 scale is 2^-127                        |
| subnormals                 | exact: E8M0 scales reach down to 2^-127, a subnormal of FP32       |
| beyond the element's range | saturates, sign kept (impossible under rceil and ceil)             |
| rounds beyond x's dtype    | the largest finite number of that dtype (GEMM operands: infinite)  |
| -0.0, negative underflow   | -0.0 (integer codes hold none: dequantize gives 0.0)               |
| axis no block divides      | as if filled with zeros                                            |
| 0-d                        | one block of one value                                             |
| empty                      | empty                                                              |
| float64                    | rounded to FP32 first (beyond its range: NaN), returned as float64 |
| arithmetic=bf16            | x is rounded to BF16 first (beyond its range: NaN)                 |
| NV formats                 | the tensor's or row's scale is that of its finite values, at least |
|                            | 2^-117; what is then out of reach becomes zero                     |
| FP32, BF16 scales          | amax / max; where that underflows to zero, the scale is one        |
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit import kernels
from lowbit.definition import codes as encoding
from lowbit.definition.blocks import from_blocks, to_blocks
from lowbit.definition.given import Scales, check_held, given_blocks
from lowbit.definition.noise import Key
from lowbit.definition.owners import factor as owned_factor
from lowbit.definition.scale import power_of_two
from lowbit.definition.steps import rounded, saturated, scaled_blocks
from lowbit.formats import BlockFormat, IntFormat, Rounding, ScaleFormat, block_format


def fake_quantize(
    x: Tensor, format: BlockFormat | str, dim: int = -1, *, key: Key | None = None
) -> Tensor:
    """Round `x` to the values `format` can hold, in blocks along `dim`; shape and dtype are kept.

    `x` is any floating-point tensor; a 2-D block covers the last two axes whatever `dim` is. The
    module's table says what becomes of special values. Stochastic rounding takes a `key` and draws
    by global position. Formats whose values need more than BF16's 8 significant bits (nvint8,
    int8, any with a tensor scale) are rounded once more when `x` is BF16. Not differentiable, the
    result is detached: `QuantLinear` supplies the straight-through gradient.

    >>> fake_quantize(torch.tensor([1.0, 0.3, -0.004]), "mxint8")
    tensor([1.0000, 0.2969, -0.0000])
    """
    format = checked(x, format, key)
    if (done := kernels.fake_quantize(x, format, dim, key)) is not None:
        return done
    values, tensor_scale = quantize_values(x, format, dim, key=key)
    if tensor_scale is not None:
        values = values.float() * tensor_scale
    return held(values, x.dtype, format)


def quantize_values(
    x: Tensor, format: BlockFormat | str, dim: int = -1, *, key: Key | None = None
) -> tuple[Tensor, Tensor | None]:
    """`fake_quantize` with the outer scale of NV formats kept apart: an FP32 scalar, or of each row
    in the shape of `x` with length 1 along `dim`; None for other formats.

    The values, code x block scale, come in FP32, or in BF16 where that loses nothing; they do not
    saturate: what rounds to 2^128 is infinite.
    """
    format = checked(x, format, key)
    if (done := kernels.quantize_values(x, format, dim, key)) is not None:
        return done
    scaled = scaled_blocks(x, format, dim)
    codes = rounded(scaled, format, dim, key)
    factor, above = scaled.scale.to(codes.dtype), scaled.tensor_scale
    if scaled.factor is not None:
        factor, above = scaled.factor, None
    values = codes.mul_(factor)
    return from_blocks(values, scaled.inside, scaled.shape).reshape(x.shape), above


def unclamped_codes(
    x: Tensor, format: BlockFormat, dim: int = -1, *, key: Key | None = None
) -> Tensor:
    """Codes as rounding leaves them, before the element's range saturates; shape of `x`."""
    format = checked(x, format, key)
    scaled = scaled_blocks(x, format, dim)
    codes = rounded(scaled, format, dim, key, clamp=False)
    return from_blocks(codes, scaled.inside, scaled.shape).reshape(x.shape)


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor as a machine would store it."""

    codes: Tensor  #: shape of the tensor; int8 integers, or uint8 bit patterns of floats
    scale: Tensor
    """One per block: bytes of E8M0 (exponent + 127, 255 is NaN) and of minifloats, else values."""
    tensor_scale: Tensor | None
    """FP32 scalar of NV formats, under `outer_scale: row` the shape of the tensor with length 1
    along `dim`; of an owner's, what it keeps."""
    format: BlockFormat
    dim: int

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values in `dtype`: those of `fake_quantize` of a tensor of that dtype, to the bit but
        for the sign of integers' zeros.
        """
        values = self.values()
        if self.outer_scale is not None:
            values = values * self.outer_scale
        return held(values, dtype, self.format)

    def values(self) -> Tensor:
        """Code x block scale in FP32, without the tensor scale: those of `quantize_values`."""
        codes = encoding.decode(self.codes, self.format.element)
        matrix = codes.reshape(codes.shape or (1,))
        blocks, inside = to_blocks(matrix, self.format.block_size, self.dim)
        scale, owner = self.scale_values(), self.format.arithmetic
        if owner.is_owners:
            assert self.tensor_scale is not None
            scale = owned_factor(scale, self.tensor_scale, owner)
        for axis in inside:
            scale = scale.unsqueeze(axis)
        return from_blocks(blocks * scale, inside, matrix.shape).reshape(codes.shape)

    @property
    def outer_scale(self) -> Tensor | None:
        """The tensor scale, where `values` leave it out: an owner's arithmetic does not."""
        return None if self.format.arithmetic.is_owners else self.tensor_scale

    def scale_values(self) -> Tensor:
        """What the stored scales mean, FP32, one per block."""
        if self.format.scale == ScaleFormat.E8M0:
            return power_of_two(self.scale)
        if self.format.scale.is_minifloat:
            return encoding.decode(self.scale, self.format.scale)
        return self.scale.float()

    def ocp_scale(self) -> Tensor:
        """E8M0 bytes as OCP MX v1.0 reads them: its integer elements are fractions 1.xxx.

        OCP's MXINT8 code carries an implied 2^-6, so its stored exponent is `scale`'s plus 6
        (bits - 2). ValueError where that leaves the byte, which only maxima above 2^127 do.
        """
        if self.format.scale != ScaleFormat.E8M0:
            raise ValueError(f"{self.format} has {self.format.scale.value} scales, OCP MX has e8m0")
        if not isinstance(self.format.element, IntFormat):
            return self.scale
        shifted = self.scale.to(torch.int32) + self.format.element.bits - 2
        shifted = torch.where(self.scale == 255, 255, shifted)
        if bool((shifted[self.scale != 255] > 254).any()):
            raise ValueError("a block maximum is too large for the scale of an OCP integer format")
        return shifted.to(torch.uint8)

    def packed_codes(self) -> Tensor:
        """`codes` as a flat uint8 tensor, 4- and 6-bit codes without gaps, low bits first."""
        return encoding.pack(self.codes, self.format.element.bits)


def quantize(
    x: Tensor,
    format: BlockFormat | str,
    dim: int = -1,
    *,
    key: Key | None = None,
    scales: Scales | None = None,
) -> QuantizedTensor:
    """Codes and scales of `x` in blocks along `dim`; `dequantize` equals `fake_quantize`.

    `scales`: take these, not those of the blocks' largest magnitudes; what they do not reach
    saturates. ValueError for one that the format's scales cannot hold.

    >>> q = quantize(torch.tensor([1.0, 0.3, -0.004]), "mxint8")
    >>> q.codes.tolist(), q.scale.tolist(), q.ocp_scale().tolist()
    ([64, 19, 0], [121], [127])
    """
    format = checked(x, format, key)
    scaled = given_blocks(x, format, dim, scales) if scales else scaled_blocks(x, format, dim)
    codes = from_blocks(rounded(scaled, format, dim, key), scaled.inside, scaled.shape)
    if scales:
        codes = codes.clamp_(format.element.min, format.element.max)
    scale = scaled.scale
    for axis in reversed(scaled.inside):
        scale = scale.squeeze(axis)
    if format.scale == ScaleFormat.E8M0:
        stored = (scale.view(torch.int32) >> 23).to(torch.uint8)  # the exponent field
    elif format.scale.is_minifloat:
        stored = encoding.encode(scale, format.scale)
    else:
        stored = scale.bfloat16() if format.scale == ScaleFormat.BF16 else scale
    elements = encoding.encode(codes.float(), format.element).reshape(x.shape)
    found = QuantizedTensor(elements, stored, scaled.tensor_scale, format, dim)
    if scales:
        check_held(found.scale_values(), scales.block, format)
    return found


def held(values: Tensor, dtype: torch.dtype, format: BlockFormat) -> Tensor:
    """In this dtype; owners let what is beyond it be infinite."""
    owned = format.arithmetic.is_owners
    return (values if owned else saturated(values, dtype)).to(dtype)


def checked(x: Tensor, format: BlockFormat | str, key: Key | None) -> BlockFormat:
    """The format itself; ValueError for what no format quantizes, and for a key without use."""
    if isinstance(format, str):
        format = block_format(format)
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}, expected a floating-point tensor")
    if (key is None) == (format.rounding is Rounding.STOCHASTIC):
        raise ValueError(f"rounding={format.rounding.value} and key={key}: stochastic takes a key")
    return format
