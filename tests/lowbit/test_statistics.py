"""Statistics of tensors, codes and gradients against numpy in float64."""

import math

import numpy as np
import pytest
import torch

from lowbit import (
    IntFormat,
    ScaleRule,
    block_format,
    fake_quantize,
    gradient_stats,
    stats,
)


@pytest.fixture
def x() -> torch.Tensor:
    x = torch.randn(8, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, 96)
    x[0, :5] = 0
    return x


@pytest.mark.parametrize("name", ["mxint8", "mxfp4", "nvfp4", "nvint4"])
def test_pair_statistics_equal_numpy(x: torch.Tensor, name: str) -> None:
    q = fake_quantize(x, name)
    a, b = x.numpy().astype(np.float64), q.numpy().astype(np.float64)
    nonzero = a != 0
    relative = (np.abs(a - b)[nonzero] / np.abs(a)[nonzero]).mean()
    qsnr = -10 * np.log10(((a - b) ** 2).sum() / (a**2).sum())
    assert float(stats.qsnr_db(x, q)) == pytest.approx(qsnr, rel=1e-12)
    assert float(stats.mean_relative_error(x, q)) == pytest.approx(relative, rel=1e-12)
    flushed = ((b == 0).sum() - (a == 0).sum()) / a.size  # zeros after less zeros before
    assert float(stats.underflow_share(x, q)) == flushed


@pytest.mark.parametrize("block_size", [16, 32, -1])
def test_crest_quantiles_equal_numpy(x: torch.Tensor, block_size: int) -> None:
    size = 96 if block_size == -1 else block_size
    blocks = x.numpy().astype(np.float64).reshape(-1, size)
    crest = np.abs(blocks).max(1) / np.sqrt((blocks**2).mean(1))
    found = stats.crest_factor(x, block_size)
    np.testing.assert_allclose(found.flatten(), crest, rtol=1e-14)
    expected = np.quantile(crest, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(stats.quantiles(found), expected, rtol=1e-14)


def test_quantiles_of_nothing_are_nan() -> None:
    assert stats.quantiles(torch.full((3,), math.nan)).isnan().all()


@pytest.mark.parametrize("name", ["mxint8", "mxint4", "mxfp8", "mxfp6_e3m2", "mxfp4", "nvfp4"])
def test_histogram_counts_the_codes_that_quantize_stores(x: torch.Tensor, name: str) -> None:
    format = block_format(name)
    found = stats.code_counts(x, format)
    codes = stats.unclamped_codes(x, format).float().clamp(format.element.min, format.element.max)
    values, counts = np.unique(codes.numpy() + 0.0, return_counts=True)
    expected = dict(zip(values.tolist(), counts.tolist(), strict=True))
    pairs = zip(found.values.tolist(), found.counts.tolist(), strict=True)
    assert {value: count for value, count in pairs if count} == expected
    share = counts / x.numel()
    assert float(found.entropy_bits) == pytest.approx(-(share * np.log2(share)).sum(), rel=1e-6)


def test_minus_128_is_counted_before_the_clamp() -> None:
    x = torch.tensor([-127.75, 127.75, 1.0, 0.0])
    floor = block_format("mxint8", scale_rule=ScaleRule.FLOOR)
    symmetric = stats.code_counts(x, floor)
    assert (int(symmetric.clamped), int(symmetric.minus_128)) == (2, 1)
    assert [float(share) for share in symmetric.endpoint_shares] == [0.25, 0.25]
    assert float(symmetric.last_bucket_share) == 0.5
    assert float(symmetric.saturated_share) == 0.5
    asymmetric = block_format(
        "mxint8", scale_rule=ScaleRule.FLOOR, element=IntFormat(8, symmetric=False)
    )
    found = stats.code_counts(x, asymmetric)
    assert (found.values[0], int(found.counts[0]), int(found.clamped)) == (-128, 1, 1)


def test_a_block_with_nan_is_in_no_count() -> None:
    x = torch.ones(2, 32)
    x[0, 3] = math.nan
    assert int(stats.code_counts(x, block_format("mxint8")).counts.sum()) == 32
    assert stats.scale_exponents(x, block_format("mxint8")) == {-6: 1}


def test_scale_exponents_reach_the_rails() -> None:
    x = torch.tensor([[0.0], [1.0], [3e38]])
    assert stats.scale_exponents(x, block_format("mxint8")) == {-127: 1, -6: 1, 121: 1}
    assert stats.scale_exponents(torch.full((1, 1), math.nan), block_format("mxint8")) == {}


def test_gradient_statistics_equal_numpy(x: torch.Tensor) -> None:
    q = fake_quantize(x, "mxfp4")
    g, h = x.numpy().astype(np.float64).ravel(), q.numpy().astype(np.float64).ravel()
    norm, noise = np.linalg.norm, h - g
    expected = {
        "cosine": g @ h / norm(g) / norm(h),
        "relative_l2": norm(noise) / norm(g),
        "norm_ratio": norm(h) / norm(g),
        "signed_bias": noise.mean() / np.abs(g).mean(),
        "magnitude_bias": 1 - (g @ h) / (g @ g),
        "noise_to_gradient": noise.std() / np.sqrt((g**2).mean()),
    }
    error = gradient_stats.gradient_error(x, q)
    assert {*expected} == {*gradient_stats.STATISTICS}
    for statistic, value in expected.items():
        assert float(getattr(error, statistic)) == pytest.approx(value, rel=1e-9), statistic


def test_a_gradient_equals_itself_and_shapes_must_agree(x: torch.Tensor) -> None:
    assert float(gradient_stats.gradient_error(x, x).relative_l2) == 0
    assert float(gradient_stats.gradient_error(x, x).magnitude_bias) == 0
    assert float(gradient_stats.gradient_error(x, 0.9 * x).magnitude_bias) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="shapes differ"):
        gradient_stats.gradient_error(x, x[:1])
