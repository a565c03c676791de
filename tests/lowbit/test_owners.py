"""NVFP4 in each owner's arithmetic, against that owner's own code: codes, scales, values."""

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit import Arithmetic, Emulate, block_format, fake_quantize, kernels, quantize

SHAPE = (512, 2048)  # 2^20 values
KINDS: dict[str, Any] = {
    "gaussian": lambda g: torch.randn(SHAPE, generator=g),
    "heavy tails": lambda g: torch.randn(SHAPE, generator=g) / torch.rand(SHAPE, generator=g),
    "40 decades": lambda g: (
        torch.randn(SHAPE, generator=g) * 10.0 ** (40 * torch.rand(SHAPE[0], 1, generator=g) - 20)
    ),
    "bf16 grid": lambda g: torch.randn(SHAPE, generator=g).bfloat16().float(),
    "ties": lambda g: _ties(g),
    "powers of two": lambda g: (
        torch.randn(SHAPE, generator=g).sign() * 2.0 ** torch.randint(-12, 12, SHAPE, generator=g)
    ),
    "outliers": lambda g: (
        torch.randn(SHAPE, generator=g) * 1e-4 + 1e4 * (torch.rand(SHAPE, generator=g) < 1e-5)
    ),
    "range ends": lambda g: _range_ends(g),
}


def _ties(generator: torch.Generator) -> Tensor:
    """Blocks whose maximum is 6 scales; other values lie between two codes, or an ulp beside."""
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    drawn = middles[torch.randint(0, 7, SHAPE, generator=generator)]
    drawn[:, ::16] = 6.0
    scale = 2.0 ** torch.randint(-4, 4, (SHAPE[0], SHAPE[1] // 16), generator=generator)
    scale *= torch.randint(8, 16, scale.shape, generator=generator) / 8
    x = drawn * scale.repeat_interleave(16, 1)
    ulps = torch.randint(-1, 2, SHAPE, generator=generator, dtype=torch.int32)
    return (x.view(torch.int32) + ulps).view(torch.float32)


def _range_ends(generator: torch.Generator) -> Tensor:
    """The largest finite numbers of BF16, and FP32's least normal and subnormal ones."""
    ends = torch.tensor([3.3895e38, 1e38, 1.2e-38, 2.0**-126, 1e-40, 0.0, -0.0, 1.0])
    x = ends[torch.randint(0, 8, SHAPE, generator=generator)]
    return x * torch.randn(SHAPE, generator=generator).sign()


@pytest.fixture(scope="module", params=KINDS)
def drawn(request: pytest.FixtureRequest) -> Tensor:
    x: Tensor = KINDS[request.param](torch.Generator().manual_seed(0))
    assert x.isfinite().all()
    return x


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(previous)


Owned = tuple[Tensor, Tensor, Tensor]  #: codes, scale bytes, values


def torchao(x: Tensor) -> Owned:
    from torchao.prototype.mx_formats.kernels import unpack_uint4
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    theirs = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=per_tensor_amax_to_scale(x.abs().amax()))
    codes = unpack_uint4(theirs.qdata).view(x.shape)
    return codes, theirs.scale.view(torch.uint8), theirs.dequantize(x.dtype)


def compressed_tensors(x: Tensor) -> Owned:
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize as theirs
    from compressed_tensors.quantization.lifecycle.forward import quantize as their_codes
    from compressed_tensors.quantization.quant_scheme import NVFP4
    from compressed_tensors.quantization.utils import helpers

    args = NVFP4["input_activations"]
    above = helpers.generate_gparam(x.amin(), x.amax())
    scale, zero = helpers.compute_dynamic_scales_and_zp(x, args, torch.nn.Module(), above)
    codes = their_codes(x, scale, zero, args, dtype=torch.float32, global_scale=above)
    bits = torch.from_numpy(codes.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8))
    values = theirs(x, scale, zero, args, global_scale=above)
    return bits, scale.to(torch.float8_e4m3fn).view(torch.uint8), values


def transformer_engine(x: Tensor) -> Owned:
    """Its PyTorch reference's order of operations, in numpy: codes by search among the values."""
    one, f = np.float32(1), np.float32
    blocks = x.float().numpy().reshape(-1, 16)
    amax, most = np.abs(blocks).max(1, keepdims=True), np.abs(blocks).max()
    with np.errstate(all="ignore"):
        encode = np.minimum(f(2688) / most, np.finfo(f).max)
        ratio = np.minimum(amax * (encode * (one / f(6))), f(448))
        stored = ratio.astype(ml_dtypes.float8_e4m3fn)
        scale = stored.astype(f)
        inverse = np.minimum(one / (scale * (one / encode)), np.finfo(f).max)
        y = np.clip(blocks * inverse, f(-6), f(6))
        codes = (y + f(0)).astype(ml_dtypes.float4_e2m1fn)
        values = codes.astype(f) * (scale * most * f(1 / 2688))
    shaped = torch.from_numpy(values.reshape(x.shape)).to(x.dtype)
    bits = torch.from_numpy(codes.view(np.uint8).reshape(x.shape))
    return bits, torch.from_numpy(stored.view(np.uint8)).view(x.shape[0], -1), shaped


OWNERS: dict[str, Callable[[Tensor], Owned]] = {
    "torchao": torchao,
    "compressed_tensors": compressed_tensors,
    "transformer_engine": transformer_engine,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("owner", OWNERS)
def test_equals_its_owners(owner: str, dtype: torch.dtype, drawn: Tensor, same_bits: Any) -> None:
    pytest.importorskip({"transformer_engine": "numpy"}.get(owner, owner))
    x = drawn.to(dtype)
    format = block_format("nvfp4", arithmetic=owner)
    codes, scales, values = OWNERS[owner](x)
    ours = quantize(x, format)
    wrong = [
        int((ours.codes != codes).sum()),
        int((ours.scale != scales.view_as(ours.scale)).sum()),
        int((fake_quantize(x, format).view(torch.int16) != values.view(torch.int16)).sum()),
    ]
    assert wrong == [0, 0, 0]
    assert same_bits(ours.dequantize(dtype), values)


@pytest.mark.parametrize("owner", OWNERS)
def test_a_layer_sees_what_is_decoded(owner: str, same_bits: Any) -> None:
    x, format = torch.randn(32, 64), block_format("nvfp4", arithmetic=owner)
    for made in (
        Emulate().operand(x, format, 1, None),
        Emulate().restored(quantize(x, format), torch.float32),
    ):
        assert made.scale is None and same_bits(made.values, fake_quantize(x, format))


def test_who_lets_a_scale_vanish() -> None:
    x = torch.full((1, 32), 1e-4)
    x[0, 0] = 1e4
    wanted = {"fp32": 2.0**-9, "torchao": 2.0**-6, "compressed_tensors": 0.125}
    for owner, least in (wanted | {"transformer_engine": 0.0}).items():
        stored = quantize(x, block_format("nvfp4", arithmetic=owner))
        assert stored.scale_values()[0, 1] == least


@pytest.mark.parametrize(
    "changes",
    [{"name": "nvint4"}, {"name": "nvfp4", "scale_rule": "up"}, {"name": "mxfp4"},
     {"name": "nvfp4", "rounding": "stochastic"}, {"name": "nvfp4", "scale_min": 2.0**-6}],
)  # fmt: skip
def test_an_owners_arithmetic_is_nvfp4s(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is that of nvfp4"):
        block_format(changes, arithmetic="torchao")


def test_kernels_leave_it_to_the_definition() -> None:
    assert not any(kernels.takes(block_format("nvfp4", arithmetic=owner)) for owner in OWNERS)
    assert [Arithmetic(owner).is_owners for owner in OWNERS] == [True] * 3
