"""On a CUDA device: the quantizers give the CPU's bits. Run by scripts/check_gpu.sh."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit import (
    Emulate,
    Key,
    QuantLinear,
    QuantRecipe,
    Rounding,
    block_format,
    fake_quantize,
    kernels,
)
from lowbit.definition.noise import uniform
from lowbit.formats import NAMED

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def awkward(dtype: torch.dtype) -> Tensor:
    """[128, 256] numbers of all sizes, among them zeros, subnormals, the largest, NaN and Inf."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 256, generator=generator)
    x *= torch.exp2(torch.randint(-40, 40, (128, 8), generator=generator).repeat_interleave(32, 1))
    x[0], x[1] = 0.0, x[1] * 1e-40
    x[2, 5], x[3, 7], x[4, 9] = torch.inf, torch.nan, torch.finfo(dtype).max
    x[5, :32], x[6, 3] = -0.0, -torch.inf
    return x.to(dtype)


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    """Any NaN equals any other."""
    integer = torch.int32 if found.dtype is torch.float32 else torch.int16
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    assert torch.equal(found.view(integer)[~nan], expected.view(integer)[~nan])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("mode", ["off", "require"])
@pytest.mark.parametrize("name", sorted(NAMED))
def test_the_same_values(name: str, mode: str, dim: int, dtype: torch.dtype) -> None:
    x, format = awkward(dtype), block_format(name)
    with kernels.using("off"):
        expected = fake_quantize(x, format, dim)
    with kernels.using(mode):
        assert_same_bits(fake_quantize(x.to(DEVICE), format, dim).cpu(), expected)


@pytest.mark.parametrize("name", ["mxint8", "mxfp8", "nvfp4"])
def test_the_same_operands_in_one_read(name: str) -> None:
    x, wanted = awkward(torch.bfloat16), (block_format(name), None)
    with kernels.using("off"):
        expected = Emulate().operands(x, wanted, wanted)
    with kernels.using("require"):
        found = Emulate().operands(x.to(DEVICE), wanted, wanted)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_bits(ours.values.cpu(), theirs.values)
        assert ours.scale is theirs.scale or torch.equal(ours.scale.cpu(), theirs.scale)


@pytest.mark.parametrize("mode", ["off", "require"])
@pytest.mark.parametrize("name", ["mxint8", "mxfp8", "mxfp4", "nvfp4"])
def test_the_same_stochastic_rounding(name: str, mode: str) -> None:
    x, key = awkward(torch.float32), Key.of(7).fold(3).at(1000)
    format = replace(block_format(name), rounding=Rounding.STOCHASTIC)
    with kernels.using(mode):
        found = fake_quantize(x.to(DEVICE), format, 1, key=key).cpu()
    with kernels.using("off"):
        assert_same_bits(found, fake_quantize(x, format, 1, key=key))
    assert torch.equal(uniform((64, 64), key, DEVICE).cpu(), uniform((64, 64), key))


@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_a_compiled_layer_gives_the_bits_of_eager() -> None:
    """One graph, whose quantizers are operators. In FP32: Inductor drops roundings to BF16."""
    torch.manual_seed(0)
    base = torch.nn.Linear(64, 96, bias=False)
    layer = QuantLinear.from_linear(base, QuantRecipe.uniform("nvfp4")).to(DEVICE)
    compiled = torch.compile(layer, fullgraph=True)
    found = []
    for network in (layer, compiled):
        torch.manual_seed(1)
        input = torch.randn(40, 64, device=DEVICE, requires_grad=True)
        network(input).square().sum().backward()
        weight = layer.weight.grad
        assert input.grad is not None and weight is not None
        found.append((input.grad, weight.clone()))
        layer.weight.grad = None
    for eager, theirs in zip(*found, strict=True):
        assert torch.equal(eager, theirs)
