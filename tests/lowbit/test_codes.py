"""Codes in bytes and back."""

import pytest
import torch

from lowbit import IntFormat, quantize
from lowbit.definition.codes import pack, unpack
from lowbit.formats import NAMED


@pytest.mark.parametrize("format", NAMED.values(), ids=str)
@pytest.mark.parametrize("shape", [(3, 37), (0,), (), (1,), (64,)])
def test_packed_codes_come_back(format, shape: tuple[int, ...]) -> None:
    x = 9 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    q = quantize(x, format)
    packed = q.packed_codes()
    bits = format.element.bits
    group = {8: 1, 6: 4, 4: 2}[bits]
    assert packed.dtype is torch.uint8
    assert packed.numel() == -(-x.numel() // group) * group * bits // 8
    signed = isinstance(format.element, IntFormat)
    assert torch.equal(unpack(packed, bits, shape, signed=signed), q.codes)
    assert q.codes.dtype is (torch.int8 if signed else torch.uint8)


def test_low_bits_come_first() -> None:
    """Two's complement nibbles, low nibble first as torchao and OCP's FP4 layouts have it."""
    assert pack(torch.tensor([1, -1, 7, -7], dtype=torch.int8), 4).tolist() == [0xF1, 0x97]
    assert pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist() == [0x21, 0x03]
    six = torch.tensor([0b000001, 0b100000, 0b111111, 0b000010], dtype=torch.uint8)
    assert pack(six, 6).tolist() == [0b00000001, 0b11111000, 0b00001011]


def test_other_widths_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="5 bits"):
        pack(torch.zeros(4, dtype=torch.int8), 5)
