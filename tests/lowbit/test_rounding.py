"""Rounding to an element's grid: ties and their neighbours, and torch's own FP8."""

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit import IntFormat, Rounding, fake_quantize
from lowbit.definition.rounding import round_to_bf16, round_to_element_
from lowbit.formats import MXFP8, MXFP8_E5M2, NAMED, FloatFormat

pytestmark = pytest.mark.usefixtures("definition")

MX = [format for format in NAMED.values() if format.scale_rule]
CASTS = {
    "mxfp8": ml_dtypes.float8_e4m3fn,
    "mxfp8_e5m2": ml_dtypes.float8_e5m2,
    "mxfp6": ml_dtypes.float6_e2m3fn,
    "mxfp6_e3m2": ml_dtypes.float6_e3m2fn,
    "mxfp4": ml_dtypes.float4_e2m1fn,
}


def _ties_and_neighbours(element: IntFormat | FloatFormat) -> Tensor:
    """All values, all midpoints, and the FP32 numbers next to each."""
    values = np.unique(np.array(element.values, np.float32))
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2])
    near = [np.nextafter(points, np.float32(side)) for side in (-np.inf, np.inf)]
    points = np.concatenate([points, *near])
    return torch.from_numpy(points[np.abs(points) <= element.max])


@pytest.mark.parametrize("format", MX, ids=str)
def test_ties_and_their_neighbours_round_to_nearest_even(format) -> None:
    x = _ties_and_neighbours(format.element)
    scale_one = torch.full((len(x), 1), float(format.element.max))  # amax = max: the scale is 1
    y = fake_quantize(torch.cat([scale_one, x[:, None]], 1), format)[:, 1].numpy()
    if format.name in CASTS:
        expected = x.numpy().astype(CASTS[format.name]).astype(np.float32)
    else:
        expected = np.rint(x.numpy())
    np.testing.assert_array_equal(y, expected)
    assert (np.signbit(y) == np.signbit(expected)).all()


@pytest.mark.parametrize("format", MX, ids=str)
def test_half_away_differs_from_nearest_even_only_at_ties(format) -> None:
    element = format.element
    values = np.unique(np.abs(np.array(element.values, np.float32)))
    ties = torch.from_numpy((values[1:] + values[:-1]) / 2)
    for sign in (1, -1):
        away = round_to_element_(sign * ties, element, Rounding.HALF_AWAY)
        assert (sign * away).tolist() == values[1:].tolist()
    x = _ties_and_neighbours(element)
    others = x[~torch.isin(x.abs(), ties)]
    assert torch.equal(
        round_to_element_(others.clone(), element, Rounding.HALF_AWAY),
        round_to_element_(others, element),
    )


@pytest.mark.parametrize("format", MX, ids=str)
def test_bf16_rounds_as_fp32(format) -> None:
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.abs() < 2 * format.element.max]  # all there is
    for rounding in (Rounding.NEAREST, Rounding.HALF_AWAY):
        y = round_to_element_(x.clone(), format.element, rounding)
        assert torch.equal(y.float(), round_to_element_(x.float(), format.element, rounding))


@pytest.mark.parametrize(
    ("format", "dtype"), [(MXFP8, torch.float8_e4m3fn), (MXFP8_E5M2, torch.float8_e5m2)]
)
def test_fp8_elements_equal_torchs_casts(format, dtype: torch.dtype) -> None:
    """10^6 values incl. ties and subnormals in blocks whose scale is one."""
    generator = torch.Generator().manual_seed(0)
    size = torch.rand(1_000_000, generator=generator) * 40 - 25
    x = torch.randn(1_000_000, generator=generator).sign() * torch.exp2(size)
    x = torch.cat([x, _ties_and_neighbours(format.element)])
    x = x.clamp(-format.element.max, format.element.max)
    largest = torch.full((len(x), 1), float(format.element.max))
    y = fake_quantize(torch.cat([largest, x[:, None]], 1), format)[:, 1]
    expected = x.to(dtype).float()
    assert torch.equal(y, expected) and torch.equal(y.signbit(), expected.signbit())


def test_round_to_bf16_is_torchs_cast() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1_000_000,), dtype=torch.int64, generator=generator)
    x = torch.cat([bits.to(torch.int32).view(torch.float32), torch.tensor([0.0, -0.0, 3.4e38])])
    x = torch.cat([x, x.view(torch.int32).bitwise_and(-0x8000).view(torch.float32)])  # ties
    assert torch.equal(round_to_bf16(x).nan_to_num(7.0), x.bfloat16().float().nan_to_num(7.0))
