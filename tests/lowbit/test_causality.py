"""What a token's output depends on: no later token, no other window, unless a scale spans them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lowbit import (
    BlockFormat,
    Integer,
    OuterScale,
    QuantLinear,
    QuantRecipe,
    Rounding,
    block_format,
    fake_quantize,
    quantize,
)
from lowbit.backend import Emulate, block_matmul
from lowbit.formats import NAMED
from lowbit.recipe import ROLES

TOKENS, WINDOWS = 24, 3
CAUSAL = [
    replace(f, outer_scale=OuterScale.ROW) if f.outer is OuterScale.TENSOR else f
    for f in NAMED.values()
]
SPANNED = [f for f in NAMED.values() if f.outer is OuterScale.TENSOR]


def _layer(format: BlockFormat, dtype: torch.dtype) -> QuantLinear:
    torch.manual_seed(0)
    return QuantLinear.from_linear(nn.Linear(64, 32, dtype=dtype), QuantRecipe.uniform(format))


def _windows(dtype: torch.dtype) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(WINDOWS, TOKENS, 64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", CAUSAL, ids=str)
def test_no_later_token_and_no_other_window(format: BlockFormat, dtype: torch.dtype) -> None:
    layer, x = _layer(format, dtype), _windows(dtype)
    output = layer(x)
    for later in (1, TOKENS - 1):
        changed = x.clone()
        changed[0, later] *= 1000  # would move a tensor's scale
        found = layer(changed)
        assert torch.equal(found[0, :later], output[0, :later])
        assert torch.equal(found[1:], output[1:])
        assert not torch.equal(found[0, later], output[0, later])
    operand = Emulate().operand(x.reshape(-1, 64), format, 1, None)
    for index, window in enumerate(x):  # the operand: products of other shapes add in other orders
        alone = Emulate().operand(window, format, 1, None)
        here = slice(index * TOKENS, (index + 1) * TOKENS)
        assert torch.equal(alone.values, operand.values[here])
        assert alone.scale is None or torch.equal(alone.scale, operand.scale[here])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", SPANNED, ids=str)
def test_one_scale_for_all_tokens_sees_the_future(format: BlockFormat, dtype: torch.dtype) -> None:
    """And other windows: why the row's is offered."""
    layer, x = _layer(format, dtype), _windows(dtype)
    changed = x.clone()
    changed[0, -1] *= 700
    output, found = layer(x), layer(changed)
    assert not torch.equal(found[0, :-1], output[0, :-1])
    assert not torch.equal(found[1:], output[1:])


ROWS = [f for f in CAUSAL if f.outer is OuterScale.ROW]


@pytest.mark.parametrize("format", ROWS, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_a_row_is_quantized_as_a_tensor_of_its_own(format: BlockFormat, dim: int) -> None:
    x = torch.randn(20, 48) * torch.randn(20, 1).exp2()
    x[3, 5], x[7, 8], x[9] = float("nan"), float("-inf"), 0
    lines = x.unbind(1 - dim)
    alone = replace(format, outer_scale=OuterScale.TENSOR)
    wanted = torch.stack([fake_quantize(line, alone) for line in lines], 1 - dim)
    found = quantize(x, format, dim)
    for ours in (fake_quantize(x, format, dim), found.dequantize()):
        assert torch.equal(ours.nan_to_num(9e9), wanted.nan_to_num(9e9))
    assert found.tensor_scale is not None
    assert found.tensor_scale.shape == ((20, 1) if dim else (1, 48))
    assert fake_quantize(x[0, 0], format) == fake_quantize(x[0, 0], alone)  # 0-d
    assert fake_quantize(x[:, :0], format, dim).shape == (20, 0)


@pytest.mark.parametrize("format", ROWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", [Emulate, Integer])
def test_rows_scales_stay_outside_the_three_products(
    format: BlockFormat, dtype: torch.dtype, backend: type
) -> None:
    if backend is Integer and format.name == "nvfp4":
        pytest.skip("no integers")
    torch.manual_seed(0)
    linear = nn.Linear(64, 32, dtype=dtype)
    layer = QuantLinear.from_linear(linear, QuantRecipe.uniform(format), backend=backend())
    x = (torch.randn(40, 64) * torch.randn(40, 1).exp2()).to(dtype).requires_grad_()
    g = torch.randn(40, 32).to(dtype)
    output = layer(x)
    output.backward(g)

    def q(name: str, matrix: Tensor) -> Tensor:
        return fake_quantize(matrix.detach().float(), format, ROLES[name].axis).double()

    weight, bias = linear.weight, linear.bias
    wanted = {
        "output": q("fprop_input", x) @ q("fprop_weight", weight).T + bias.detach().double(),
        "input": q("dgrad_grad_output", g) @ q("dgrad_weight", weight),
        "weight": q("wgrad_grad_output", g).T @ q("wgrad_input", x),
    }
    assert x.grad is not None and weight.grad is not None
    found = {"output": output.detach(), "input": x.grad, "weight": weight.grad}
    once = 2.0**-8 if dtype is torch.bfloat16 else 0.0  # rounded once, after FP32's sums
    for name, value in wanted.items():
        error = (found[name].double() - value).abs()
        assert bool((error <= once * value.abs() + 2.0**-20 * value.abs().max()).all()), name


def test_what_a_row_scale_is_not_for() -> None:
    row = block_format("nvfp4", outer_scale="row")
    with pytest.raises(ValueError, match="2-D blocks have none"):
        replace(row, block_size=(16, 16))
    with pytest.raises(ValueError, match="dgrad contracts over the rows"):
        QuantRecipe(fprop_weight=row, reuse_fprop_weight=True)
    with pytest.raises(ValueError, match="arithmetic=torchao"):
        replace(row, arithmetic=block_format({"name": "nvfp4", "arithmetic": "torchao"}).arithmetic)
    assert block_matmul(torch.ones(2, 16), torch.ones(3, 16), row).tolist() == [[16.0] * 3] * 2
    assert replace(row, rounding=Rounding.STOCHASTIC).outer is OuterScale.ROW
