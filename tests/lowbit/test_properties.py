"""What holds for every input, searched with hypothesis."""

import math
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.extra import numpy as hnp
from torch import Tensor

from lowbit import IntFormat, Rounding, ScaleFormat, ScaleRule, fake_quantize
from lowbit.formats import MXINT8, NAMED, NVINT8, BlockFormat

pytestmark = pytest.mark.usefixtures("definition")

FORMATS = [replace(format, block_size=8) for format in NAMED.values()]
E8M0 = [
    replace(format, scale_rule=rule)
    for format in FORMATS
    if format.scale is ScaleFormat.E8M0
    for rule in ScaleRule
]
SCALED_LINEARLY = [format for format in FORMATS if format.scale is not ScaleFormat.E8M0]
HALF_AWAY = [replace(format, rounding=Rounding.HALF_AWAY) for format in FORMATS]
EVERY = E8M0 + SCALED_LINEARLY + HALF_AWAY


def _tensors() -> st.SearchStrategy[Tensor]:
    """2 x 24 FP32 values of all sizes; and such whose mantissas sit at ties."""
    anything = st.floats(-(2.0**127), 2.0**127, width=32)
    ties = st.builds(math.ldexp, st.integers(-511, 511), st.integers(-140, 100))
    return hnp.arrays(np.float32, (2, 24), elements=anything | ties.map(np.float32)).map(
        torch.from_numpy
    )


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


@given(x=_tensors())
def test_every_format_is_odd_and_finite(x: Tensor) -> None:
    for format in EVERY:
        y = fake_quantize(x, format)
        assert y.isfinite().all(), format
        assert _same(fake_quantize(-x, format), -y), format


@given(x=_tensors())
def test_an_axis_is_the_last_of_the_transpose(x: Tensor) -> None:
    for format in EVERY:
        y = fake_quantize(x, format, 0)
        assert _same(y, fake_quantize(x.t(), format, 1).t()), format


@given(x=_tensors())
def test_e8m0_formats_are_idempotent(x: Tensor) -> None:
    for format in E8M0:
        y = fake_quantize(x, format)
        assert _same(fake_quantize(y, format), y), format


@given(x=_tensors(), exponent=st.integers(-40, 40))
def test_e8m0_formats_are_equivariant_under_powers_of_two(x: Tensor, exponent: int) -> None:
    x = x.where((x.abs() > 2.0**-40) & (x.abs() < 2.0**80), 0.0)  # so that no scale meets a limit
    for format in E8M0:
        y = fake_quantize(x * 2.0**exponent, format)
        assert _same(y, fake_quantize(x, format) * 2.0**exponent), format


@given(x=_tensors(), poison=st.sampled_from([math.nan, math.inf, -math.inf, 3e38, 1e-45]))
def test_an_e8m0_block_does_not_see_another(x: Tensor, poison: float) -> None:
    poisoned = x.clone()
    poisoned[1, 9] = poison
    for format in E8M0:
        y, z = fake_quantize(x, format), fake_quantize(poisoned, format)
        assert bool(z[1, 8:16].isnan().all()) == (not math.isfinite(poison)), format
        y[1, 8:16] = z[1, 8:16] = 0.0
        assert _same(y, z), format


def test_the_asymmetric_range_under_floor_is_neither_odd_nor_idempotent() -> None:
    format = replace(MXINT8, element=IntFormat(8, symmetric=False), scale_rule=ScaleRule.FLOOR)
    x = torch.tensor([-127.75, 3.0])
    y = fake_quantize(x, format)
    assert y.tolist() == [-128.0, 3.0]
    assert fake_quantize(-x, format).tolist() == [127.0, -3.0]  # -y is [128, -3]
    assert fake_quantize(y, format).tolist() == [-128.0, 4.0]  # amax 128: the scale doubles


def test_nvint8_is_not_idempotent() -> None:
    """Its scale rounds to nearest: a block's largest code may be 119, which sets another scale."""
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    y = fake_quantize(x, NVINT8)
    assert not torch.equal(fake_quantize(y, NVINT8), y)


@pytest.mark.parametrize("format", SCALED_LINEARLY[:3], ids=str)
def test_nv_blocks_share_the_tensor_scale(format: BlockFormat) -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    louder = torch.cat([x[:8] * 3.3, x[8:]])
    assert not torch.equal(fake_quantize(louder, format)[8:], fake_quantize(x, format)[8:])
