"""Element values as stored codes, and codes packed into bytes."""

import torch
from torch import Tensor

from lowbit.kinds.elements import FloatFormat, IntFormat, ScaleFormat


def encode(values: Tensor, element: IntFormat | FloatFormat | ScaleFormat) -> Tensor:
    """Codes of FP32 values that `element` holds: int8 for integers, uint8 bit patterns for floats.

    NaN becomes the largest bit pattern where the format has a NaN, else code 0 (its scale is NaN).
    """
    if isinstance(element, IntFormat):
        return torch.where(values.isnan(), 0.0, values).to(torch.int8)
    magnitude = values.abs()
    hidden = 127 - element.bias << element.mantissa_bits  # FP32's exponent bias against ours
    normal = (magnitude.view(torch.int32) >> 23 - element.mantissa_bits) - hidden
    subnormal = (magnitude / element.smallest).to(torch.int32)
    codes = torch.where(magnitude >= 2.0**element.min_exponent, normal, subnormal)
    width = element.exponent_bits + element.mantissa_bits
    codes = codes | values.signbit().to(torch.int32) << width  # of elements: no scale is negative
    nan = 2**width - 1 if element.has_nan else 0
    return torch.where(values.isnan(), nan, codes).to(torch.uint8)


def decode(codes: Tensor, element: IntFormat | FloatFormat | ScaleFormat) -> Tensor:
    """FP32 values of codes as `encode` makes them."""
    if isinstance(element, IntFormat):
        return codes.float()
    values = [element.decode(code) for code in range(2**element.bits)]
    return torch.tensor(values, device=codes.device)[codes.long()]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (int8 or uint8, any shape) as flat uint8: two 4-bit codes a byte, four 6-bit codes in
    three bytes, low bits first; a short last group is filled with zeros. 8-bit codes as they are.
    """
    flat = codes.reshape(-1).view(torch.uint8)
    if bits == 8:
        return flat
    per_group = {4: 2, 6: 4}.get(bits)
    if per_group is None:
        raise ValueError(f"codes of {bits} bits cannot be packed, only 4, 6 and 8")
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % per_group))
    fields = (flat.to(torch.int32) & 2**bits - 1).reshape(-1, per_group)
    word = sum(fields[:, i] << bits * i for i in range(per_group))
    group_bytes = bits * per_group // 8
    return (
        torch.stack([word >> 8 * i & 255 for i in range(group_bytes)], 1).to(torch.uint8).flatten()
    )


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...], *, signed: bool) -> Tensor:
    """Undo `pack`; `signed` for integer codes (int8), else uint8 bit patterns."""
    if bits == 8:
        return packed.view(torch.int8 if signed else torch.uint8).reshape(shape)
    per_group = {4: 2, 6: 4}[bits]
    group = packed.to(torch.int32).reshape(-1, bits * per_group // 8)
    word = sum(group[:, i] << 8 * i for i in range(group.shape[1]))
    codes = torch.stack([word >> bits * i & 2**bits - 1 for i in range(per_group)], 1).flatten()
    codes = codes[: torch.Size(shape).numel()].reshape(shape)
    if signed:
        return (codes - (codes >> bits - 1 << bits)).to(torch.int8)
    return codes.to(torch.uint8)
