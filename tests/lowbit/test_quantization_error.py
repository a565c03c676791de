"""The sums that a kernel takes in one read are those of the quantized tensor."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit import Rounding, block_format, fake_quantize, kernels, qsnr_db
from lowbit.definition.noise import Key
from lowbit.formats import NAMED
from lowbit.stats import (
    QuantizationError,
    crest_factor,
    quantization_error,
    quantization_errors,
    underflow_share,
)


def sample(*shape: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x.view(-1)[3] = 0
    return x * torch.logspace(-6, 2, shape[-1])


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [0, 1])
def test_equals_the_quantized_tensor(name: str, dtype: torch.dtype, dim: int) -> None:
    for shape in ((64, 96), (37, 50)):
        x = sample(*shape).to(dtype)
        q = fake_quantize(x.float(), name, dim)
        found = quantization_error(x, block_format(name), dim)
        assert found.qsnr_db == pytest.approx(float(qsnr_db(x, q)), abs=1e-5)
        assert found.underflow_share == float(underflow_share(x, q))
        assert (found.nonzero, found.kept, found.count) == (
            *(int(values.count_nonzero()) for values in (x, q)),
            x.numel(),
        )


@pytest.mark.parametrize("name", ["mxint8", "mxfp4", "nvint4"])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_kernel_equals_the_definition(name: str, stochastic: bool, scale: float) -> None:
    """Squares of 1e-30 and 1e30 leave FP32; a transposed view is read as it lies."""
    format = block_format(name)
    key = Key.of(1).at(7) if stochastic else None
    if stochastic:
        format = replace(format, rounding=Rounding.STOCHASTIC)
    for x in (sample(64, 40) * scale, (sample(40, 64) * scale).t()):
        found = quantization_error(x, format, 1, key=key)
        with kernels.using("off"):
            expected = quantization_error(x, format, 1, key=key)
        assert vars(found) == pytest.approx(vars(expected), rel=1e-6, abs=0)


@pytest.mark.parametrize("dim", [0, 1])
def test_sharing_a_read_changes_no_sum(dim: int) -> None:
    """Of several block sizes and rounding rules at once, bit for bit."""
    stochastic = block_format("mxint4", rounding=Rounding.STOCHASTIC)
    names = ("mxint8", "nvfp4", "mxfp8", "int8", "nvint4")
    wanted = [*((block_format(name), None) for name in names), (stochastic, Key.of(1).at(7))]
    for x in (sample(64, 96).bfloat16(), sample(96, 64).t(), sample(37, 50), torch.zeros(0, 4)):
        found = quantization_errors(x, wanted, dim)
        assert found == [quantization_error(x, f, dim, key=key) for f, key in wanted]


def test_parts_add_up() -> None:
    x, format = sample(64, 96), block_format("mxint4")
    parts = sum((quantization_error(part, format) for part in x.split(24)), QuantizationError())
    assert vars(parts) == pytest.approx(vars(quantization_error(x, format)), rel=1e-6)


@pytest.mark.parametrize("block_size", [32, 16, 7, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_crest_factors_by_kernel(block_size: int, dtype: torch.dtype) -> None:
    x = sample(3, 20, 40).to(dtype)
    x[0, 0] = 0
    for dim in range(3):
        found = crest_factor(x, block_size, dim)
        with kernels.using("off"):
            expected = crest_factor(x, block_size, dim)
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0, equal_nan=True)
