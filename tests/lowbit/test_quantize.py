"""What becomes of every kind of input: the table of lowbit/quantize.py, row by row."""

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
    Key,
    Rounding,
    ScaleFormat,
    ScaleRule,
    fake_quantize,
    quantize,
)
from lowbit.formats import INT8, MXFP8, MXINT8, NAMED, NVFP4

pytestmark = pytest.mark.usefixtures("definition")

FORMATS = list(NAMED.values())
VARIANTS = [
    *FORMATS,
    *(
        replace(format, scale_rule=rule)
        for format in (MXINT8, MXFP8)
        for rule in list(ScaleRule)[1:]
    ),
    *(replace(format, rounding=Rounding.HALF_AWAY) for format in (MXINT8, MXFP8, NVFP4, INT8)),
    *(replace(f, arithmetic=Arithmetic.BF16) for f in FORMATS if f.scale is not ScaleFormat.FP32),
    replace(INT8, scale=ScaleFormat.BF16, block_size=32),
    replace(MXINT8, element=IntFormat(8, symmetric=False), scale_rule=ScaleRule.FLOOR),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
Same = Callable[[Tensor, Tensor], bool]
Wide = Callable[..., Tensor]
every_format = pytest.mark.parametrize("format", FORMATS, ids=str)
every_variant = pytest.mark.parametrize("format", VARIANTS, ids=str)


@every_variant
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_nan_or_inf_makes_its_block_nan_and_no_other(
    format: BlockFormat, poison: float, same_bits: Same
) -> None:
    format = replace(format, block_size=16)
    x = torch.randn(4, 48, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 9.0  # holds the largest magnitude, so that no tensor scale depends on the rest
    poisoned = x.clone()
    poisoned[2, 20] = poison
    expected = fake_quantize(x, format)
    expected[2, 16:32] = math.nan
    assert same_bits(fake_quantize(poisoned, format), expected)


@every_variant
def test_zero_blocks_give_zeros_and_keep_signs(format: BlockFormat, same_bits: Same) -> None:
    x = torch.zeros(2, 64)
    x[:, ::3] = -0.0
    assert same_bits(fake_quantize(x, format), x)
    if format.scale is ScaleFormat.E8M0:
        assert not quantize(x, format).scale.any()  # byte 0, 2^-127


@every_variant
def test_negative_underflow_is_minus_zero(format: BlockFormat) -> None:
    y = fake_quantize(torch.tensor([1.0, -1e-12, 1e-12]), format)
    assert y[1:].tolist() == [0.0, 0.0] and y.signbit().tolist() == [False, True, False]


@every_variant
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_finite_number_becomes_infinite_or_nan(format: BlockFormat, dtype: torch.dtype) -> None:
    info = torch.finfo(torch.float32 if dtype is torch.float64 else dtype)
    most = torch.finfo(torch.bfloat16).max if format.arithmetic is Arithmetic.BF16 else info.max
    x = torch.linspace(-1, 1, 64, dtype=torch.float64).outer(torch.ones(1, dtype=torch.float64))
    for size in (min(most, info.max), info.tiny, info.smallest_normal * info.eps):
        y = fake_quantize((x * size).to(dtype), format, dim=0)
        assert y.dtype is dtype and y.isfinite().all()
        assert torch.equal(-y, fake_quantize(-(x * size).to(dtype), format, dim=0)) or (
            format.element.min != -format.element.max
        )


def test_beyond_the_range_saturates_with_its_sign() -> None:
    x = torch.tensor([511.0, -511.0, 449.0])  # floor takes scale 1
    floor = replace(MXFP8, scale_rule=ScaleRule.FLOOR)
    assert fake_quantize(x, floor).tolist() == [448.0, -448.0, 448.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_beyond_the_dtype_gives_its_largest_number(dtype: torch.dtype) -> None:
    most = torch.finfo(torch.float32 if dtype is torch.float64 else dtype).max
    x = torch.tensor([most, -most], dtype=dtype)  # to 4 significant bits: a power of two above
    assert torch.equal(fake_quantize(x, MXFP8), x)
    assert torch.equal(quantize(x, MXFP8).dequantize(dtype), x)


@every_format
@pytest.mark.parametrize("dim", [0, 1])
def test_an_axis_that_no_block_divides_counts_as_filled_with_zeros(
    format: BlockFormat, dim: int, wide: Wide, same_bits: Same
) -> None:
    format = replace(format, block_size=32)
    x = wide(64, 64, 6.0)
    shorter = x.narrow(dim, 0, 41)
    filled = x.clone()
    filled.narrow(dim, 41, 23).zero_()
    assert same_bits(
        fake_quantize(shorter, format, dim), fake_quantize(filled, format, dim).narrow(dim, 0, 41)
    )


@every_format
@pytest.mark.parametrize("shape", [(), (0,), (0, 64), (64, 0), (3, 0, 5), (1,), (5,), (2, 3, 40)])
def test_any_shape_and_axis(format: BlockFormat, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for dim in range(-max(x.ndim, 1), max(x.ndim, 1)):
        y = fake_quantize(x, format, dim)
        q = quantize(x, format, dim)
        assert y.shape == q.codes.shape == x.shape
        assert torch.equal(q.dequantize(), y)
        size = format.block_size
        expected = list(x.shape or (1,))
        expected[dim] = min(expected[dim], 1) if size == -1 else -(-expected[dim] // size)
        assert list(q.scale.shape) == expected or size == -1


@every_format
def test_a_scalar_is_a_block_of_one(format: BlockFormat) -> None:
    assert fake_quantize(torch.tensor(3.0), format) == fake_quantize(torch.tensor([3.0]), format)


@every_format
def test_memory_layout_does_not_matter(format: BlockFormat, wide: Wide, same_bits: Same) -> None:
    x = wide(64, 96, 6.0)
    strided = torch.empty(64, 192)[:, ::2].copy_(x)
    for view in (x.t().contiguous().t(), strided, x.expand(2, -1, -1)[1]):
        for dim in (0, 1):
            assert same_bits(fake_quantize(view, format, dim), fake_quantize(x, format, dim))
    assert same_bits(fake_quantize(x.t(), format, 0), fake_quantize(x, format, 1).t())
    batch = x.reshape(4, 16, 96)
    assert same_bits(fake_quantize(batch, format, 2), fake_quantize(x, format, 1).view_as(batch))


@every_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_quantized_as_the_fp32_of_their_values(
    format: BlockFormat, dtype: torch.dtype, wide: Wide, same_bits: Same
) -> None:
    x = wide(64, 96, 8.0 if dtype is torch.float16 else 80.0).to(dtype)
    y = fake_quantize(x, format, 0)
    expected = fake_quantize(x.float(), format, 0)
    limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    assert same_bits(y, expected.clamp(-limit, limit).to(dtype))


def test_float64_beyond_fp32_is_nan() -> None:
    assert fake_quantize(torch.tensor([1e39, 1.0], dtype=torch.float64), MXINT8).isnan().all()


@pytest.mark.parametrize("name", ["mxint8", "mxfp4", "nvfp4"])
def test_two_dimensional_blocks(name: str, same_bits: Same) -> None:
    format = replace(NAMED[name], block_size=(16, 16))
    x = torch.randn(2, 40, 56, generator=torch.Generator().manual_seed(0))
    y = fake_quantize(x, format)
    assert same_bits(y.mT, fake_quantize(x.mT, format))  # a weight and its transpose agree
    tile = x[:, 16:32, 32:48].reshape(2, 256)
    if format.scale is ScaleFormat.E8M0:
        expected = fake_quantize(tile, replace(format, block_size=256))
        assert same_bits(y[:, 16:32, 32:48].reshape(2, 256), expected)
    assert same_bits(quantize(x, format).dequantize() + 0.0, y + 0.0)


def test_the_whole_axis_is_a_block_of_minus_one() -> None:
    x = torch.randn(8, 100, generator=torch.Generator().manual_seed(0))
    for dim, size in ((0, 8), (1, 100)):
        expected = fake_quantize(x, replace(INT8, block_size=size), dim)
        assert torch.equal(fake_quantize(x, INT8, dim), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fake_quantize(torch.ones(4, dtype=torch.int32), MXINT8), "int32"),
        (lambda: fake_quantize(torch.ones(4), "mxint9"), "mxint9"),
        (lambda: fake_quantize(torch.ones(4, 4), MXINT8, dim=2), "dim=2"),
        (lambda: quantize(torch.ones(4), replace(MXINT8, block_size=(2, 2))), "2-D"),
        (lambda: fake_quantize(torch.ones(4), MXINT8, key=Key.of(0)), "stochastic takes a key"),
        (
            lambda: fake_quantize(torch.ones(4), replace(MXINT8, rounding=Rounding.STOCHASTIC)),
            "stochastic takes a key",
        ),
    ],
)
def test_bad_calls_say_what_is_wrong(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@every_variant
def test_the_input_is_left_alone_and_no_gradient_pretends(format: BlockFormat) -> None:
    x = torch.randn(4, 64, requires_grad=True)
    before = x.detach().clone()
    y = fake_quantize(x, format)
    assert torch.equal(x, before) and not y.requires_grad
