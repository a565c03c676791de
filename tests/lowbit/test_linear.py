"""The layer: bitwise the baseline where nothing is named, elsewhere exactly its six operands."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lowbit import QuantLinear, QuantRecipe, Rotation, convert_linears, fake_quantize
from lowbit.formats import MXFP8, MXINT8, NVFP4, NVINT8, BlockFormat
from lowbit.recipe import OPERANDS

OUTPUT_OF = {"fprop": "output", "dgrad": "grad_input", "wgrad": "grad_weight"}


def run(
    recipe: QuantRecipe, dtype: torch.dtype = torch.float32, tokens: int = 96
) -> dict[str, Tensor]:
    """Output and gradients of one layer on fixed data, 3-D input."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 32, bias=False)
    input = torch.randn(2, tokens // 2, 64, requires_grad=True)
    upstream = torch.randn(2, tokens // 2, 32)
    layer = QuantLinear.from_linear(linear, recipe)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        output = layer(input)
    output.backward(upstream.to(output.dtype))
    assert input.grad is not None and linear.weight.grad is not None
    return {"output": output.detach(), "grad_input": input.grad, "grad_weight": linear.weight.grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operand", OPERANDS)
def test_a_field_changes_its_own_gemm_and_no_other(operand: str, dtype: torch.dtype) -> None:
    plain, changed = run(QuantRecipe(), dtype), run(QuantRecipe(**{operand: MXINT8}), dtype)
    differing = {name for name in plain if not torch.equal(plain[name], changed[name])}
    assert differing == {OUTPUT_OF[operand.split("_")[0]]}


class StraightThrough:
    """An independent layer: plain autograd through x + (q(x) - x).detach(), one GEMM at a time."""

    @staticmethod
    def q(x: Tensor, format: BlockFormat | None, dim: int) -> Tensor:
        return x if format is None else x + (fake_quantize(x, format, dim) - x).detach()

    @classmethod
    def run(cls, recipe: QuantRecipe, tokens: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        weight = nn.Linear(64, 32, bias=False).weight
        input = torch.randn(2, tokens // 2, 64, requires_grad=True)
        upstream = torch.randn(2, tokens // 2, 32).reshape(-1, 32)
        flat = input.reshape(-1, 64)
        q = cls.q
        output = q(flat, recipe.fprop_input, 1) @ q(weight, recipe.fprop_weight, 1).t()
        dgrad = q(upstream, recipe.dgrad_grad_output, 1)
        (grad_input,) = torch.autograd.grad(
            flat @ q(weight, recipe.dgrad_weight, 0).t(), input, dgrad
        )
        wgrad = q(upstream, recipe.wgrad_grad_output, 0)
        (grad_weight,) = torch.autograd.grad(
            q(flat, recipe.wgrad_input, 0) @ weight.t(), weight, wgrad
        )
        shape = (2, tokens // 2, 32)
        return {
            "output": output.detach().reshape(shape),
            "grad_input": grad_input,
            "grad_weight": grad_weight,
        }


@pytest.mark.parametrize("format", [MXINT8, MXFP8, replace(MXINT8, block_size=16)])
@pytest.mark.parametrize("tokens", [96, 70])  # 70: the last block of tokens is filled with zeros
def test_gradients_equal_an_independent_autograd(format: BlockFormat, tokens: int) -> None:
    recipe = QuantRecipe.uniform(format)
    ours, witness = run(recipe, tokens=tokens), StraightThrough.run(recipe, tokens)
    for name in ours:
        assert torch.equal(ours[name], witness[name]), name


@pytest.mark.parametrize("format", [NVFP4, NVINT8])
def test_tensor_scales_stay_outside_the_product(format: BlockFormat) -> None:
    recipe = QuantRecipe.uniform(format)
    ours, witness = run(recipe), StraightThrough.run(recipe, 96)
    for name in ours:
        torch.testing.assert_close(ours[name], witness[name], rtol=1e-5, atol=1e-5)


def test_zero_filled_tokens_are_explicit_zeros() -> None:
    recipe = QuantRecipe(wgrad_grad_output=MXINT8, wgrad_input=MXINT8)
    layer = QuantLinear.from_linear(nn.Linear(64, 32, bias=False), recipe)
    short, upstream = torch.randn(70, 64), torch.randn(70, 32)
    layer(short).backward(upstream)
    assert layer.weight.grad is not None
    gradient, layer.weight.grad = layer.weight.grad, None
    fill = nn.functional.pad
    layer(fill(short, (0, 0, 0, 26))).backward(fill(upstream, (0, 0, 0, 26)))
    torch.testing.assert_close(gradient, layer.weight.grad, rtol=1e-6, atol=1e-6)


def test_rotation_leaves_an_unquantized_product_and_helps_an_outlier() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 32, bias=False)
    input = torch.randn(8, 64)
    input[:, 5] *= 50
    exact = linear(input)

    def error(rotation: Rotation | None) -> float:
        recipe = replace(QuantRecipe.uniform("mxint4").only("fprop"), fprop_rotation=rotation)
        layer = QuantLinear.from_linear(linear, recipe)
        return float((layer(input) - exact).detach().norm())

    assert error(Rotation(32)) < 0.8 * error(None)


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, intermediate_size=128, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128, attention_bias=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_recipe_without_operands_is_bitwise_the_plain_model(autocast: bool) -> None:
    """Loss, every gradient and the keys, biases included, through QuantLinear."""
    plain = model()
    quant = convert_linears(copy.deepcopy(plain), QuantRecipe(), skip=("lm_head",))
    assert sum(isinstance(m, QuantLinear) for m in quant.modules()) == 14
    assert list(plain.state_dict()) == list(quant.state_dict())
    ids = torch.randint(0, 128, (3, 40))
    losses = []
    for network in (plain, quant):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = network(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
    assert torch.equal(*losses)
    for (name, a), b in zip(plain.named_parameters(), quant.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert torch.equal(a.grad, b.grad), name


def test_quantized_as_the_gemm_would_have_received_it() -> None:
    """Under autocast the operand is the BF16 tensor, not the FP32 one."""
    linear = nn.Linear(64, 32, bias=False)
    layer = QuantLinear.from_linear(linear, QuantRecipe.uniform(MXINT8).only("fprop"))
    input = torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(input)
    a = fake_quantize(input.bfloat16(), MXINT8)
    b = fake_quantize(linear.weight.detach().bfloat16(), MXINT8)
    assert torch.equal(output, a @ b.t())
