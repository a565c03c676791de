"""Quantized layers inside whole models: checkpointing, accumulation, compilation, precisions."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from lowbit import (
    QuantLinear,
    QuantRecipe,
    Randomness,
    Rotation,
    Rounding,
    block_format,
    convert_linears,
    fake_quantize,
    kernels,
)
from lowbit.formats import MXINT8

RANDOM = block_format("mxint8", rounding=Rounding.STOCHASTIC)
STOCHASTIC = QuantRecipe(  # everything random at once, the forward pass too
    *(RANDOM, RANDOM, RANDOM, RANDOM, RANDOM, RANDOM), wgrad_rotation=Rotation(32, seed=1)
)
NEAREST = QuantRecipe.uniform("mxint8")
SHAPE = dict(
    hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=1,
    num_key_value_heads=1, vocab_size=64, use_cache=False,
)  # fmt: skip


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE | changes))


def qwen(**changes: Any) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE | {"head_dim": 32} | changes))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "llama, biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "qwen3": qwen,
    "qwen3, tied": lambda: qwen(tie_word_embeddings=True),
}


def gradients(model: nn.Module, ids: Tensor, autocast: bool = True) -> dict[str, Tensor]:
    """Loss and gradients by name."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(model.parameters()))
    return grads | {"loss": loss.detach()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def tokens(rows: int = 2, length: int = 48) -> Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(0))


CASES = [(name, STOCHASTIC, True) for name in MODELS]
CASES += [("llama", NEAREST, True), ("llama", NEAREST, False), ("llama", STOCHASTIC, False)]


@pytest.mark.parametrize(("name", "recipe", "autocast"), CASES)
def test_activation_checkpointing_changes_no_bit(
    name: str, recipe: QuantRecipe, autocast: bool
) -> None:
    randomness = Randomness(0)
    model = convert_linears(MODELS[name](), recipe, skip=("lm_head",), randomness=randomness)
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 14
    randomness.set(3, 96)
    plain = gradients(model, tokens(), autocast)
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert same(plain, gradients(model, tokens(), autocast))
    randomness.set(4, 96)
    assert same(plain, gradients(model, tokens(), autocast)) == (recipe is NEAREST)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("build", [llama, qwen])
def test_the_output_layer_too(build: Callable[..., Any], tied: bool) -> None:
    """Quantized with the embedding's own parameter where they are tied."""
    model = convert_linears(build(tie_word_embeddings=tied), NEAREST)
    assert isinstance(model.lm_head, QuantLinear)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    quantized = gradients(model, tokens())
    plain = gradients(build(tie_word_embeddings=tied), tokens())
    assert quantized.keys() == plain.keys()
    for name, value in plain.items():
        assert 0 < (quantized[name] - value).norm() / value.norm() < 0.1, name


@pytest.mark.parametrize("split", [[4], [2, 2], [1, 3], [1, 1, 1, 1]])
def test_any_split_of_a_batch_draws_the_same(split: list[int]) -> None:
    """Sequences of 64 tokens keep blocks inside a micro-batch: the operands are the same bits."""
    seen: dict[str, list[Tensor]] = {}

    from lowbit.backend import Emulate, one_by_one

    class Recording:
        name, operands = "recording", one_by_one

        def operand(self, x: Tensor, format: Any, dim: int, key: Any) -> Any:
            operand = Emulate().operand(x, format, dim, key)
            index = f"{tuple(x.shape[1:])} {dim} {key.state}"
            seen.setdefault(index, []).append(operand.values)
            return operand

        def matmul(self, *args: Any) -> Tensor:
            return Emulate().matmul(*args)

    torch.manual_seed(0)
    linear, input, upstream = nn.Linear(32, 64), torch.randn(4, 64, 32), torch.randn(4, 64, 64)
    found = []
    for sizes in ([4], split):
        seen = {}
        randomness = Randomness(0)
        layer = QuantLinear.from_linear(
            linear, STOCHASTIC, backend=Recording(), randomness=randomness
        )
        first = 0
        for size in sizes:
            randomness.set(5, torch.tensor(first * 64))
            part = slice(first, first + size)
            layer(input[part].requires_grad_()).backward(upstream[part])
            first += size
        found.append({index: (values, sizes) for index, values in seen.items()})
    whole, parts = found
    assert len(whole) == 6 and whole.keys() == parts.keys()
    for index, ((expected,), _) in whole.items():
        values = parts[index][0]
        if len(expected) == 256:
            assert torch.equal(torch.cat(values), expected), index
        else:  # a weight: the same for all micro-batches
            assert all(torch.equal(value, expected) for value in values), index


@pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 3, 32), (0, 32), (2, 2, 2, 32)])
def test_inputs_of_any_rank(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(32, 64)
    layer = QuantLinear.from_linear(linear, NEAREST)
    input = torch.randn(shape, requires_grad=True)
    output = layer(input)
    assert output.shape == linear(input).shape
    flat = fake_quantize(input.detach().reshape(-1, 32), MXINT8)
    expected = torch.addmm(linear.bias, flat, fake_quantize(linear.weight.detach(), MXINT8).t())
    assert torch.equal(output.reshape(-1, 64), expected)
    output.sum().backward()
    assert input.grad is not None and input.grad.shape == shape


@pytest.mark.parametrize("frozen", ["weight", "input"])
def test_only_the_gradient_that_is_needed(frozen: str) -> None:
    """A frozen weight or input: the other gradient is what it is beside it."""
    grads = []
    for freeze in (False, True):
        torch.manual_seed(0)
        layer = QuantLinear.from_linear(nn.Linear(32, 64), NEAREST)
        input = torch.randn(40, 32, requires_grad=not (freeze and frozen == "input"))
        layer.weight.requires_grad_(not (freeze and frozen == "weight"))
        layer(input).square().sum().backward()
        grads.append({"weight": layer.weight.grad, "input": input.grad})
    assert grads[1][frozen] is None
    other = {"weight": "input", "input": "weight"}[frozen]
    assert torch.equal(grads[0][other], grads[1][other])


def test_saved_for_backward_is_what_the_plain_layer_saves() -> None:
    """Under autocast: the BF16 input and the BF16 weight, once each."""
    saved = []
    for quantize in (False, True):
        torch.manual_seed(0)
        linear: nn.Linear = nn.Linear(64, 32)
        layer = QuantLinear.from_linear(linear, NEAREST) if quantize else linear
        kept: list[tuple[torch.Size, torch.dtype]] = []

        def keep(x: Tensor, kept: list[Any] = kept) -> Tensor:
            kept.append((x.dtype, x.numel()))
            return x

        input = torch.randn(2, 20, 64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            with torch.autocast("cpu", torch.bfloat16):
                layer(input)
        saved.append(sorted(map(str, kept)))
    assert saved[0] == saved[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.compile's own
@pytest.mark.parametrize(
    ("build", "recipe", "mode"),
    [(llama, STOCHASTIC, "off"), (llama, STOCHASTIC, "auto"), (qwen, NEAREST, "auto")],
)
def test_compiled_as_one_graph_is_bitwise_eager(
    build: Callable[..., Any], recipe: QuantRecipe, mode: str
) -> None:
    """FP32, without graph breaks, and not compiled again for another step or row.

    Tracing the definition is slow: one layer under it is enough.
    """
    torch._dynamo.reset()
    randomness = Randomness(0)
    skip = ("lm_head", "*.mlp.*", "*.[qkv]_proj") if mode == "off" else ("lm_head",)
    model = convert_linears(build(num_hidden_layers=1), recipe, skip=skip, randomness=randomness)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with kernels.using(mode):
        for step in range(3):
            randomness.set(step, 96 * step)
            eager = gradients(model, tokens(), autocast=False)
            with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
                found = gradients(compiled, tokens(), autocast=False)
            found = {name.removeprefix("_orig_mod."): value for name, value in found.items()}
            assert same(eager, found), step


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_inductor_computes_a_layer_bitwise_as_eager() -> None:
    """Its own code for the quantizers, where no sum is reordered: all bits of one FP32 layer."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = QuantLinear.from_linear(nn.Linear(64, 96), NEAREST)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True)
    results = []
    with kernels.using("off"):
        for network in (layer, compiled):
            torch.manual_seed(1)
            input = torch.randn(40, 64, requires_grad=True)
            network(input).square().sum().backward()
            weight = next(network.parameters())
            results.append({"input": input.grad, "weight": weight.grad})
    assert same(*results)
