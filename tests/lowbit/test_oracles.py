"""The definition against independent implementations, bit for bit: numpy in float64, torchao."""

import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit import ScaleFormat, ScaleRule, fake_quantize, quantize
from lowbit.formats import INT8, MXFP8, NAMED, NVFP4, BlockFormat, FloatFormat

pytestmark = pytest.mark.usefixtures("definition")

MX = [format for format in NAMED.values() if format.scale is ScaleFormat.E8M0]
UNDER_RULES = [replace(format, scale_rule=rule) for format in MX for rule in ScaleRule]
SCALED_LINEARLY = [
    *(format for format in NAMED.values() if format.scale is not ScaleFormat.E8M0),
    replace(INT8, block_size=32),
    replace(INT8, scale=ScaleFormat.BF16, block_size=32),
    replace(MXFP8, scale=ScaleFormat.BF16, scale_rule=None),
]


@pytest.fixture(scope="module")
def torchao_mx() -> Callable[..., tuple[Tensor, Tensor]]:
    """(values, scale bytes) of torchao's `to_mx`; the import warns and logs about missing GPUs."""
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = pytest.importorskip("torchao.prototype.mx_formats.config")
        from torchao.prototype.mx_formats.mx_tensor import MXTensor
    logging.disable(previous)
    dtypes: dict[str, Any] = {
        "mxfp8": torch.float8_e4m3fn,
        "mxfp8_e5m2": torch.float8_e5m2,
        "mxfp6": "fp6_e2m3",
        "mxfp6_e3m2": "fp6_e3m2",
        "mxfp4": torch.float4_e2m1fn_x2,
    }

    def quantize(x: Tensor, format: BlockFormat) -> tuple[Tensor, Tensor]:
        assert format.scale_rule is not None and isinstance(format.block_size, int)
        rule = config.ScaleCalculationMode(format.scale_rule.value)
        mx = MXTensor.to_mx(x, dtypes[format.name], format.block_size, rule)
        return mx.dequantize(torch.float32), mx.scale.view(torch.uint8)

    return quantize


@pytest.mark.parametrize("format", UNDER_RULES + SCALED_LINEARLY, ids=str)
def test_equals_the_float64_reference(format: BlockFormat, reference, wide, same_bits) -> None:
    for x in (wide(128, 512, 12.0), wide(32, 512, 85.0, seed=1)):
        assert same_bits(fake_quantize(x, format), reference(x, format))


@pytest.mark.parametrize("rule", list(ScaleRule))
@pytest.mark.parametrize("format", [f for f in MX if isinstance(f.element, FloatFormat)], ids=str)
def test_equals_torchao(
    format: BlockFormat,
    rule: ScaleRule,
    torchao_mx: Callable[..., Any],
    wide: Callable[..., Tensor],
) -> None:
    format = replace(format, scale_rule=rule)
    x = wide(1024, 1024)
    values, scale = torchao_mx(x, format)
    assert torch.equal(fake_quantize(x, format), values)
    assert torch.equal(quantize(x, format).scale, scale)


def test_nvfp4_against_torchao(torchao_mx: Callable[..., Any], wide: Callable[..., Tensor]) -> None:
    """The same scales; it multiplies by a reciprocal where we divide: a code in 10^6 differs."""
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    x = wide(1024, 1024, 3.0)
    theirs = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=per_tensor_amax_to_scale(x.abs().amax()))
    ours = quantize(x, replace(NVFP4, scale_min=2.0**-6))
    assert torch.equal(theirs.scale.view(torch.uint8).view_as(ours.scale), ours.scale)
    assert (theirs.qdata.flatten() != ours.packed_codes()).sum() < 10


def test_where_torchao_is_wrong(
    torchao_mx: Callable[..., Any], reference: Callable[..., Tensor]
) -> None:
    """Release 0.18; what it should be is the reference's answer, and ours."""
    tiny = torch.linspace(-1, 1, 32) * 1e-36  # wants the scale 2^-127, subnormal in FP32
    floor = replace(MXFP8, scale_rule=ScaleRule.FLOOR)
    right = reference(tiny, MXFP8)
    assert right[-1] == pytest.approx(1e-36, rel=0.05)
    assert torch.equal(fake_quantize(tiny, MXFP8), right)
    assert torch.equal(fake_quantize(tiny, floor), right)
    assert not torchao_mx(tiny, MXFP8)[0].any()  # flushed to zero
    assert torchao_mx(tiny, floor)[0][-1] == right[-1] / 2  # scaled by 2^-126, stored as 2^-127
    infinite = torch.tensor([math.inf] + [1.0] * 31)
    assert fake_quantize(infinite, MXFP8).isnan().all()
    assert torchao_mx(infinite, MXFP8)[1].item() == 254  # not NaN
