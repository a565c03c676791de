"""Stored codes and scales, the clipping that the study describes, and microxcaling's vectors."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit import (
    Arithmetic,
    BlockFormat,
    IntFormat,
    Rounding,
    ScaleFormat,
    ScaleRule,
    fake_quantize,
    quantize,
)
from lowbit.formats import INT8, MXFP8, MXINT8, NAMED, NVFP4, NVINT8

pytestmark = pytest.mark.usefixtures("definition")

VARIANTS = [
    *NAMED.values(),
    *(replace(f, arithmetic=Arithmetic.BF16) for f in (MXINT8, MXFP8, NVINT8, NVFP4)),
    replace(INT8, scale=ScaleFormat.BF16, block_size=32),
    replace(INT8, scale=ScaleFormat.BF16, block_size=32, arithmetic=Arithmetic.BF16),
    replace(MXINT8, element=IntFormat(8, symmetric=False), scale_rule=ScaleRule.FLOOR),
    replace(MXFP8, scale_rule=ScaleRule.FLOOR, rounding=Rounding.HALF_AWAY),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
Same = Callable[[Tensor, Tensor], bool]
Wide = Callable[..., Tensor]
every_variant = pytest.mark.parametrize("format", VARIANTS, ids=str)


@every_variant
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_is_fake_quantize(
    format: BlockFormat, dtype: torch.dtype, wide: Wide, same_bits: Same
) -> None:
    x = wide(40, 80, 8.0 if dtype is torch.float16 else 80.0).to(dtype)
    x[3] = 0.0
    for dim in (0, 1):
        expected = fake_quantize(x, format, dim)
        if isinstance(format.element, IntFormat):
            expected = expected + 0.0  # integers hold no -0
        assert same_bits(quantize(x, format, dim).dequantize(dtype), expected)


def test_the_symmetric_range_binds_under_floor() -> None:
    floor = replace(MXINT8, scale_rule=ScaleRule.FLOOR)
    x = torch.full((32,), -127.75)  # scale 1: the nearest code is -128
    assert fake_quantize(x, floor).unique().tolist() == [-127.0]
    asymmetric = replace(floor, element=IntFormat(8, symmetric=False))
    assert fake_quantize(x, asymmetric).unique().tolist() == [-128.0]


def _share_of_minus_128(format: BlockFormat, x: Tensor) -> float:
    asymmetric = replace(format, element=IntFormat(8, symmetric=False))
    assert not (quantize(x, format).codes == -128).any()
    return 100 * (quantize(x, asymmetric).codes == -128).double().mean().item()


def test_the_studys_clipping_mechanism() -> None:
    """Quotients in BF16 reach -128, in FP32 never; shares as measured in the study's ablation."""
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    linear = replace(INT8, scale=ScaleFormat.BF16, block_size=32)
    in_bf16 = replace(linear, arithmetic=Arithmetic.BF16)
    assert _share_of_minus_128(in_bf16, x) == pytest.approx(0.233, abs=0.015)
    assert _share_of_minus_128(linear, x) == 0
    # x / (x / 127), where every value is its block's largest
    assert _share_of_minus_128(replace(in_bf16, block_size=1), -x.abs()) == pytest.approx(
        16.82, abs=0.15
    )
    # E8M0 with log2 in BF16; with exact exponents under floor, which clips
    assert _share_of_minus_128(replace(MXINT8, arithmetic=Arithmetic.BF16), x) == pytest.approx(
        0.025, abs=0.006
    )
    assert _share_of_minus_128(MXINT8, x) == 0
    floor = replace(MXINT8, scale_rule=ScaleRule.FLOOR)
    assert _share_of_minus_128(floor, x) == pytest.approx(0.010, abs=0.003)
    # numerics.md 3.5: E4M3 scales round down half the time, whatever the arithmetic
    assert _share_of_minus_128(NVINT8, x) == pytest.approx(1.6, abs=0.1)


def test_ocp_scales_of_integers_carry_their_implied_fraction() -> None:
    """OCP MXINT8 codes are multiples of 2^-6, so 1.0 = code 64 is stored under 2^0, byte 127."""
    x = torch.tensor([[1.0], [1.9921875], [0.0], [math.nan]]) * torch.ones(32)
    q = quantize(x, MXINT8)
    assert q.scale.flatten().tolist() == [121, 122, 0, 255]
    assert q.ocp_scale().flatten().tolist() == [127, 128, 6, 255]
    value = q.codes[0, 0] * 2.0**-6 * 2.0 ** (int(q.ocp_scale()[0, 0]) - 127)
    assert value == 1.0
    assert torch.equal(quantize(x, MXFP8).ocp_scale(), quantize(x, MXFP8).scale)
    with pytest.raises(ValueError, match="too large"):
        quantize(torch.full((32,), 3.4e38), MXINT8).ocp_scale()
    with pytest.raises(ValueError, match="nvfp4 has e4m3 scales"):
        quantize(x, NVFP4).ocp_scale()


def test_microxcalings_mxint8_vectors() -> None:
    """numerics.md 3.2: what microxcaling gives with round='even' and 'nearest'."""
    x = torch.tensor([1.0234375, 1.0078125, 0.0078125, 0.0234375, -0.0078125, 1.984375])
    even = fake_quantize(x, replace(MXINT8, scale_rule=ScaleRule.FLOOR))
    assert even.tolist() == [1.03125, 1.0, 0.0, 0.03125, -0.0, 1.984375]
    half_away = replace(MXINT8, scale_rule=ScaleRule.FLOOR, rounding=Rounding.HALF_AWAY)
    away = fake_quantize(x, half_away)
    assert away.tolist() == [1.03125, 1.015625, 0.015625, 0.03125, -0.015625, 1.984375]
    floor = replace(NAMED["mxfp4"], scale_rule=ScaleRule.FLOOR)
    y = fake_quantize(torch.tensor([6, 5, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25, 7, -0.1]), floor)
    assert y.tolist() == [6, 4, 4, 2, 2, 1, 1, 0, 6, -0.0]
