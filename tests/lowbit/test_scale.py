"""Block scales: MX corner tables byte for byte, the rules at their boundaries, NV scales."""

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit import BlockFormat, IntFormat, ScaleFormat, ScaleRule, fake_quantize, quantize
from lowbit.formats import INT8, MXFP8, MXINT8, NAMED, NVFP4, NVINT4, NVINT8

pytestmark = pytest.mark.usefixtures("definition")

INF, NAN = math.inf, math.nan
FP32_MAX = torch.finfo(torch.float32).max
UNDER_RULES = [
    replace(format, scale_rule=rule)
    for format in NAMED.values()
    if format.scale is ScaleFormat.E8M0
    for rule in ScaleRule
]


def _after(x: float) -> float:
    return float(np.nextafter(np.float32(x), np.float32(INF)))


def _before(x: float) -> float:
    return float(np.nextafter(np.float32(x), np.float32(-INF)))


# (first value, the other 31) -> (scale byte, first code, the others') under floor, under rceil;
# numerics.md 3.3, checked there on torchao's main branch
CORNERS = {
    "zero": ((0.0, 0.0), (0, 0, 0), (0, 0, 0)),
    "smallest normal": ((2.0**-126,) * 2, (0, 64, 64), (0, 64, 64)),
    "smallest subnormal": ((2.0**-149,) * 2, (0, 0, 0), (0, 0, 0)),
    "-smallest subnormal": ((-(2.0**-149),) * 2, (0, 128, 128), (0, 128, 128)),
    "mixed inf": ((INF, 1.0), (255, 127, 127), (255, 127, 127)),
    "mixed nan": ((NAN, 1.0), (255, 127, 127), (255, 127, 127)),
    "nan": ((NAN, NAN), (255, 127, 127), (255, 127, 127)),
    "448": ((448.0, 448.0), (127, 126, 126), (127, 126, 126)),
    "-448": ((-448.0, -448.0), (127, 254, 254), (127, 254, 254)),
    "480": ((480.0, 480.0), (127, 126, 126), (128, 119, 119)),
    "-480": ((-480.0, -480.0), (127, 254, 254), (128, 247, 247)),
    "max": ((FP32_MAX,) * 2, (246, 126, 126), (247, 120, 120)),
    "-max": ((-FP32_MAX,) * 2, (246, 254, 254), (247, 248, 248)),
    "subnormal among ones": ((2.0**-149, 1.0), (119, 0, 120), (119, 0, 120)),
    "max among ones": ((FP32_MAX, 1.0), (246, 126, 0), (247, 120, 0)),
    "3.5 + ulp": ((_after(3.5),) * 2, (120, 126, 126), (121, 118, 118)),
    "512 - ulp": ((_before(512.0),) * 2, (127, 126, 126), (128, 120, 120)),
}


@pytest.mark.parametrize("case", CORNERS)
@pytest.mark.parametrize("column", [1, 2], ids=["floor", "rceil"])
def test_mxfp8_corner_table(case: str, column: int) -> None:
    first, others = CORNERS[case][0]
    rule = [ScaleRule.FLOOR, ScaleRule.RCEIL][column - 1]
    q = quantize(torch.tensor([first] + [others] * 31), replace(MXFP8, scale_rule=rule))
    scale, first_code, other_code = CORNERS[case][column]
    assert q.scale.tolist() == [scale]
    assert q.codes.tolist() == [first_code] + [other_code] * 31


@pytest.mark.parametrize(
    ("ratio", "byte"),
    [
        *((0.0, 0), (2.0**-149, 0), (2.0**-127, 0), (_after(2.0**-127), 1)),
        *((_before(2.0**-126), 1), (2.0**-126, 1), (2.0**-64, 63), (_after(2.0**-64), 64)),
        *((_before(1.0), 127), (1.0, 127), (_after(1.0), 128), (2.0**64, 191)),
        *((_after(2.0**64), 192), (2.0**127, 254), (INF, 255), (NAN, 255)),
        # a bare ratio would overflow here; amax / max of a real element never gets that far
        *((_after(2.0**127), 254), (FP32_MAX, 254)),
    ],
)
def test_rceil_bytes_of_a_ratio(ratio: float, byte: int) -> None:
    unit = BlockFormat("int2", IntFormat(2))  # its largest code is 1: amax / max = amax
    assert quantize(torch.tensor([ratio]), unit).scale.tolist() == [byte]


def _exponent(amax: float, format: BlockFormat) -> int:
    """The rules as formulas on exact fractions."""
    most = Fraction(format.element.max)
    emax = math.frexp(format.element.max)[1] - 1
    exact = Fraction(amax)
    floor = math.frexp(amax)[1] - 1
    match format.scale_rule:
        case ScaleRule.RCEIL:
            return next(e for e in range(-400, 400) if most * Fraction(2) ** e >= exact)
        case ScaleRule.CEIL:
            return floor + (exact > Fraction(2) ** floor) - emax
        case ScaleRule.EVEN:
            step = Fraction(2) ** (floor - format.element.mantissa_bits)
            return math.frexp(float(math.floor(exact / step + Fraction(1, 2)) * step))[1] - 1 - emax
        case _:
            return floor - emax


@pytest.mark.parametrize("format", UNDER_RULES, ids=str)
def test_rules_hold_one_ulp_around_their_boundaries(format: BlockFormat) -> None:
    half_step = 2.0 ** -(format.element.mantissa_bits + 2)
    significands = [1.0, format.element.max / 2.0 ** math.floor(math.log2(format.element.max))]
    significands += [2 - 2 * half_step, 2 - 4 * half_step, 1.5]
    points = [s * 2.0**e for s in significands for e in (-120, -20, 0, 3, 100)]
    amax = [value for p in points for value in (_before(p), p, _after(p))]
    bytes_ = quantize(torch.tensor(amax)[:, None], format).scale.flatten().tolist()
    expected = [min(max(_exponent(value, format), -127), 127) + 127 for value in amax]
    assert bytes_ == expected


@pytest.mark.parametrize("format", UNDER_RULES, ids=str)
@pytest.mark.parametrize("size", [1e-36, 1e-38, 1e-40, 2.0**-149])
def test_data_near_the_bottom_of_fp32(
    format: BlockFormat, size: float, reference: Callable[..., Tensor]
) -> None:
    """Scales that are subnormal in FP32, where torchao 0.18 is off."""
    x = torch.linspace(-1, 1, 64) * size
    assert torch.equal(fake_quantize(x, format), reference(x, format))


def test_the_tensor_scale_is_that_of_the_finite_values() -> None:
    x = torch.tensor([[3.0] * 16, [INF] + [1e30] * 15, [NAN] * 16])
    for format in (NVFP4, NVINT4, NVINT8):
        expected = np.float32(1e30) / np.float32(448 * format.element.max)
        q = quantize(x, format)
        assert q.tensor_scale is not None and q.tensor_scale.item() == expected
        assert q.scale.flatten().tolist() == [1, 127, 127]  # 2^-9, NaN, NaN
        assert fake_quantize(x, format).isnan().any(1).tolist() == [False, True, True]


def test_e4m3_scales_round_to_nearest_and_stop_at_their_floor() -> None:
    blocks = torch.tensor([448.0, 100.0, 13.0, 0.3, 2.0**-9, 2.0**-11, 0.0])[:, None]
    x = (blocks * 6).expand(-1, 16).contiguous()  # the tensor scale is 1
    bytes_ = quantize(x, NVFP4).scale.flatten()
    expected = blocks.flatten().numpy().astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert bytes_.tolist() == [*expected[:-2].tolist(), 1, 1]
    torchao_floor = quantize(x, replace(NVFP4, scale_min=2.0**-6)).scale.flatten().tolist()
    assert torchao_floor == [*expected[:4].tolist(), 8, 8, 8]


def test_a_tensor_scale_stays_above_2_to_the_minus_117() -> None:
    q = quantize(torch.full((16,), 2.0**-127), NVFP4)
    assert q.tensor_scale is not None and q.tensor_scale.item() == 2.0**-117
    assert q.dequantize().tolist() == [2.0**-127] * 16  # half a unit of 2^-126: code 0.5
    assert not fake_quantize(torch.full((16,), 2.0**-130), NVFP4).any()  # out of reach


def test_linear_scales_are_stored_as_they_are() -> None:
    x = torch.tensor([[127.0, 1.0], [3.0, -1.0], [0.0, 0.0]])
    q = quantize(x, INT8)
    assert q.scale.dtype is torch.float32
    assert q.scale.flatten().tolist() == [1.0, np.float32(3) / np.float32(127), 1.0]
    bf16 = quantize(x, replace(INT8, scale=ScaleFormat.BF16))
    assert bf16.scale.dtype is torch.bfloat16
    assert bf16.scale.flatten().tolist() == [1.0, float(torch.tensor(3 / 127).bfloat16()), 1.0]


def test_where_a_linear_scale_underflows_it_is_one() -> None:
    q = quantize(torch.full((4,), 2.0**-149), INT8)
    assert q.scale.tolist() == [1.0] and q.codes.tolist() == [0] * 4


def test_two_dimensional_blocks_have_one_scale_each() -> None:
    x = torch.zeros(3, 64, 64)
    x[1, 32:, :32] = 100.0
    q = quantize(x, replace(MXINT8, block_size=(32, 32)))
    assert q.scale.shape == (3, 2, 2)
    assert (q.scale == 127).nonzero().tolist() == [[1, 1, 0]]
