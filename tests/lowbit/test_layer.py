"""What the table of test_contract.py takes more than a few lines for: float64's double backward,
every kind of computing again, conversion, edges.
"""

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowbit
from lowbit import (
    FloatFormat,
    Integer,
    Keep,
    QuantLinear,
    QuantRecipe,
    Randomness,
    Reuse,
    Rotation,
    Rounding,
    block_format,
    conversion,
    convert_linears,
    fake_quantize,
    kernels,
)

INT8 = QuantRecipe.uniform("mxint8")
RANDOM = QuantRecipe.uniform(block_format("mxint8", rounding=Rounding.STOCHASTIC))
TURNED = replace(INT8, wgrad_rotation=Rotation(32, seed=1), dgrad_rotation=Rotation(32, seed=1))
integer = pytest.mark.skipif(not kernels.enabled(), reason="no C++ compiler")


def layer(recipe: QuantRecipe = INT8, **how: Any) -> QuantLinear:
    torch.manual_seed(0)
    how.setdefault("randomness", Randomness(0))
    return QuantLinear.from_linear(nn.Linear(64, 96), recipe, **how)


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, 64, generator=torch.Generator().manual_seed(1))


# --- a second backward ---------------------------------------------------------------------------


class Straight64:
    """An independent layer in float64: three products of x + (Q(x) - x).detach()."""

    def __init__(self, of: QuantLinear) -> None:
        self.recipe = of.recipe
        self.weights = [p.detach().double().requires_grad_() for p in (of.weight, of.bias)]

    def q(self, x: Tensor, name: str, dim: int) -> Tensor:
        format = self.recipe.format(name)
        assert format is not None
        return x + (fake_quantize(x.detach().float(), format, dim).double() - x).detach()


@pytest.mark.parametrize("backend", [lowbit.Emulate, pytest.param(Integer, marks=integer)])
@pytest.mark.parametrize("name", ["mxint8", "nvint8", "int8"])
def test_a_second_backward_is_float64s_straight_through(name: str, backend: Any) -> None:
    """d penalty / d (x, weight, upstream), with upstream a leaf: no quantizer of fprop between."""
    ours = layer(QuantRecipe.uniform(name), backend=backend())
    x, g = tokens(64).requires_grad_(), torch.randn(64, 96).requires_grad_()
    first = torch.autograd.grad(ours(x), [x, ours.weight], g, create_graph=True)
    penalty = first[0].square().sum() + first[1].square().sum()
    found = torch.autograd.grad(penalty, [x, ours.weight, g])
    witness = Straight64(ours)
    x64, g64 = (t.detach().double().requires_grad_() for t in (x, g))
    weight = witness.weights[0]
    dgrad = witness.q(g64, "dgrad_grad_output", 1) @ witness.q(weight, "dgrad_weight", 0)
    wgrad = witness.q(g64, "wgrad_grad_output", 0).t() @ witness.q(x64, "wgrad_input", 0)
    expected = torch.autograd.grad(dgrad.square().sum() + wgrad.square().sum(), [x64, weight, g64])
    for ours_, theirs in zip(found, expected, strict=True):
        assert (ours_ - theirs).norm() / theirs.norm() < 1e-5


@pytest.mark.parametrize("recipe", [INT8, TURNED, QuantRecipe.uniform("nvint8")])
def test_a_gradient_penalty_has_nearly_the_plain_layers_effect(recipe: QuantRecipe) -> None:
    ours = layer(recipe)
    plain = nn.Linear(64, 96)
    plain.load_state_dict(ours.state_dict())
    effects = []
    for module in (ours, plain):
        x = tokens(64).requires_grad_()
        (g,) = torch.autograd.grad(module(x).sin().sum(), x, create_graph=True)
        g.square().sum().backward()
        effects.append(module.weight.grad.norm())  # type: ignore[union-attr]
    assert abs(effects[0] / effects[1] - 1) < 0.01


@pytest.mark.parametrize("create_graph", [False, True])
def test_the_first_gradients_are_the_same_bits_with_and_without_a_graph(create_graph: bool) -> None:
    ours, x = layer(TURNED), tokens(40).requires_grad_()
    grads = torch.autograd.grad(ours(x).sum(), [x, ours.weight], create_graph=create_graph)
    plain = torch.autograd.grad(ours(x).sum(), [x, ours.weight])
    assert all(map(torch.equal, grads, plain))


@pytest.mark.parametrize("how", ["reuse", "codes"])
def test_a_second_backward_without_the_input_is_refused(how: str) -> None:
    ours = layer(keep=Keep(quantized_inputs=how == "codes"))
    with torch.autocast("cpu", torch.bfloat16), Reuse():
        output = ours(tokens(32).requires_grad_() * 1.0)
    with pytest.raises(RuntimeError, match="compute this forward without them"):
        torch.autograd.grad(output.float().sum(), ours.weight, create_graph=True)


# --- autocast around backward --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["nvint8", "int8", "turned"])
def test_backward_inside_autocast_is_backward_outside(name: str, dtype: torch.dtype) -> None:
    found = []
    for inside in (False, True):
        ours = layer(TURNED if name == "turned" else QuantRecipe.uniform(name))
        with torch.autocast("cpu", dtype):
            loss = ours(tokens(40)).float().square().mean()
        with torch.autocast("cpu", dtype, enabled=inside):
            loss.backward()
        found.append(ours.weight.grad)
    assert torch.equal(*found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mxint8", "nvint8", "turned", "codes"])
def test_compiled_under_autocast_is_eager(name: str) -> None:
    torch._dynamo.reset()
    recipe = {"turned": TURNED, "codes": INT8}.get(name) or QuantRecipe.uniform(name)
    found = []
    for compiled in (False, True):
        ours = layer(recipe, keep=Keep(quantized_inputs=name == "codes"))
        run = torch.compile(ours, fullgraph=True, backend="aot_eager") if compiled else ours
        with torch.autocast("cpu", torch.bfloat16):
            run(tokens(40)).float().square().mean().backward()
        found.append(ours.weight.grad)
    assert torch.equal(*found)


# --- sharing and keeping -------------------------------------------------------------------------


def _load_twice(ours: QuantLinear) -> None:
    for factor in (3.0, 2.0):
        state = {k: v * factor for k, v in ours.state_dict().items()}
        ours.load_state_dict(state, assign=True)


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.weight.data.mul_(2),
        lambda x: setattr(x.weight, "data", x.weight.data * 2),
        _load_twice,
        lambda x: x.weight.detach().numpy().__imul__(2),
    ],
    ids=["data.mul_", "data =", "load(assign)", "numpy"],
)
def test_a_kept_weight_is_never_stale(write: Callable[[QuantLinear], Any]) -> None:
    """Outside `Reuse`, whoever writes; within, after `forget` and after optimizers' steps."""
    ours = layer(keep=Keep(quantized_weights=True))
    x = tokens(32)
    ours(x)
    with torch.no_grad():
        write(ours)
    fresh = QuantLinear.from_linear(nn.Linear(64, 96), INT8)
    fresh.weight, fresh.bias = ours.weight, ours.bias
    assert torch.equal(ours(x), fresh(x))


def test_two_recipes_with_both_graphs_open_keep_apart() -> None:
    ours, reuse = layer(keep=Keep(quantized_weights=True)), Reuse()
    fp8 = QuantRecipe.uniform("mxfp8")
    x = tokens(32).requires_grad_()
    with reuse:
        first = ours(x)
        ours.set_recipe(fp8)
        second = ours(x)
    for output, recipe in ((first, INT8), (second, fp8)):
        (found,) = torch.autograd.grad(output.sum(), x)
        alone = layer(recipe)
        assert torch.equal(found, torch.autograd.grad(alone(x).sum(), x)[0])


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "thread"])
def test_reuse_stays_with_its_model_and_thread(copied: str) -> None:
    ours = layer(keep=Keep(quantized_weights=True))
    reuse = Reuse()
    with reuse:
        before = ours(tokens(32))
        if copied == "thread":
            found: list[Tensor] = []
            work = lambda: found.append(ours(tokens(32)))  # noqa: E731
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            assert torch.equal(found[0], before)
            return
        other, again = copy.deepcopy((ours, reuse))
        if copied == "pickle":
            other, again = pickle.loads(pickle.dumps((ours, reuse)))
        assert not again._weights and len(reuse._weights) == 1
        assert torch.equal(other(tokens(32)), before)


# --- recomputation -------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, reentrant: bool | None, nested: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.reentrant, self.nested = reentrant, nested

    def inner(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))

    def forward(self, x: Tensor, depth: int = 0) -> Tensor:
        if self.reentrant is None or depth > self.nested:
            return self.inner(x)
        return checkpoint(self.forward, x, depth + 1, use_reentrant=self.reentrant)


def _two_micro_batches(reentrant: bool | None, nested: bool, moves: str) -> list[Tensor]:
    """Gradients where recipe or random numbers have moved on before backward."""
    randomness = Randomness(3)
    recipe = RANDOM if moves == "randomness" else INT8
    net = convert_linears(Net(reentrant, nested), recipe, randomness=randomness)
    inputs = [tokens(32).mul(i + 1).requires_grad_() for i in range(2)]
    losses = []
    for i, x in enumerate(inputs):
        randomness.set(i, 32 * i)
        losses.append(net(x * 1.0).square().sum())
        if moves != "randomness":
            target = QuantRecipe.uniform("mxfp4") if moves == "recipe" else QuantRecipe()
            for module in (net.a, net.b):
                module.set_recipe(target)  # type: ignore[operator]
    for loss in losses:
        loss.backward()
    return [x.grad for x in (*inputs, *net.parameters())]  # type: ignore[misc]


@pytest.mark.parametrize("moves", ["randomness", "recipe", "to the baseline"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_repeats_its_forward(reentrant: bool, nested: bool, moves: str) -> None:
    plain = _two_micro_batches(None, False, moves)
    assert all(map(torch.equal, plain, _two_micro_batches(reentrant, nested, moves)))


def _two_compiled(reentrant: bool | None, moves: str, backend: str) -> list[Tensor]:
    """As _two_micro_batches; what lies within the checkpointed region is compiled."""
    torch._dynamo.reset()
    randomness = Randomness(3)
    recipe = RANDOM if moves == "randomness" else INT8
    net: Any = convert_linears(Net(None, False), recipe, randomness=randomness)
    net.compile(backend=backend)
    if moves == "changed before":
        for module in (net.a, net.b):
            module.set_recipe(QuantRecipe.uniform("mxfp8"))
    inputs = [tokens(32).mul(i + 1).requires_grad_() for i in range(2)]
    losses = []
    for i, x in enumerate(inputs):
        randomness.set(i, 32 * i)
        output = net(x) if reentrant is None else checkpoint(net, x, use_reentrant=reentrant)
        losses.append(output.square().sum())
        if moves in ("recipe", "to the baseline") and reentrant is not None:
            target = QuantRecipe.uniform("mxfp4") if moves == "recipe" else QuantRecipe()
            for module in (net.a, net.b):
                module.set_recipe(target)
    for loss in losses:
        loss.backward()
    return [x.grad for x in (*inputs, *net.parameters())]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("reentrant", "moves"),
    [
        (False, "randomness"),
        (True, "randomness"),
        (False, "changed before"),
        (False, "recipe"),
        (True, "to the baseline"),
    ],
)
def test_a_compiled_layer_repeats_its_forward_or_refuses(reentrant: bool, moves: str) -> None:
    if moves in ("recipe", "to the baseline"):
        with pytest.raises(RuntimeError, match="call backward before set_recipe"):
            _two_compiled(reentrant, moves, "aot_eager")
        return
    plain = _two_compiled(None, moves, "aot_eager")
    assert all(map(torch.equal, plain, _two_compiled(reentrant, moves, "aot_eager")))


def test_another_kind_of_recomputation_is_refused() -> None:
    ours = layer(RANDOM)
    x = tokens(32).requires_grad_()
    y = x * 1.0
    y.register_hook(lambda _: ours(tokens(32)).detach().sum() * 0 + 1)
    with pytest.raises(RuntimeError, match=r"use torch.utils.checkpoint"):
        y.sum().backward()


# --- what is refused by name ----------------------------------------------------------------------


def _pruned() -> nn.Module:
    from torch.nn.utils import prune

    return prune.l1_unstructured(nn.Linear(64, 96), "weight", 0.5)


class Lora(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def _old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(64, 96))


UNCONVERTIBLE: dict[str, Callable[[], nn.Module]] = {
    "own forward": lambda: Lora(64, 96),
    "lazy": lambda: nn.LazyLinear(96),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(64, 96)),
    "spectral": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(64, 96)),
    "weight_norm": _old_weight_norm,
    "pruned": _pruned,
    "attention": lambda: nn.MultiheadAttention(64, 4),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", UNCONVERTIBLE)
def test_a_layer_that_computes_something_else_is_refused_by_name(kind: str) -> None:
    model = nn.ModuleDict({"fine": nn.Linear(64, 96), "odd": UNCONVERTIBLE[kind]()})
    with pytest.raises(ValueError, match="layer odd"):
        convert_linears(model, INT8)
    assert type(model["fine"]) is nn.Linear
    convert_linears(model, INT8, skip=("odd*",))
    assert conversion(model).converted == ("fine",) and conversion(model).skipped


# --- what a conversion keeps ---------------------------------------------------------------------


def test_one_layer_at_several_places_is_one_layer() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    model.append(model[0])
    convert_linears(model, INT8)
    assert model[0] is model[2] and isinstance(model[0], QuantLinear)
    assert conversion(model).shared == {"2": "0"} and conversion(model).converted == ("0", "2")


def test_a_lone_layer_is_returned() -> None:
    assert isinstance(convert_linears(nn.Linear(64, 96), INT8), QuantLinear)


def test_hooks_flags_and_attributes_stay() -> None:
    base = nn.Linear(64, 96).eval()
    seen: list[str] = []
    handle = base.register_forward_hook(lambda *_: seen.append("hook"))
    base.weight.requires_grad_(False)
    base.note = "mine"  # type: ignore[assignment]
    model = convert_linears(nn.Sequential(base), INT8)
    model(tokens(4))
    handle.remove()
    model(tokens(4))
    assert seen == ["hook"] and not model[0].training and model[0].note == "mine"
    assert not model[0].weight.requires_grad


def test_parts_of_a_model_with_one_randomness_draw_apart() -> None:
    randomness = Randomness(0)
    parts = [convert_linears(nn.Sequential(nn.Linear(64, 96)), RANDOM, randomness=randomness)]
    parts.append(convert_linears(copy.deepcopy(nn.Sequential(nn.Linear(64, 96))), RANDOM,
                                 randomness=randomness))  # fmt: skip
    parts[1].load_state_dict(parts[0].state_dict())
    assert not torch.equal(parts[0](tokens(32)), parts[1](tokens(32)))


# --- edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [lowbit.Emulate, pytest.param(Integer, marks=integer)])
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_no_tokens(shape: tuple[int, ...], backend: Any) -> None:
    ours = layer(backend=backend())
    x = tokens(*shape).requires_grad_()
    ours(x).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert ours.weight.grad is not None and not ours.weight.grad.any()


@pytest.mark.parametrize("shape", [(5, 3), (4,), (2, 3, 4)])
@pytest.mark.parametrize("gemm", ["fprop", "dgrad", "wgrad"])
def test_gemms_without_operands_are_bitwise_nn_linears(gemm: str, shape: tuple[int, ...]) -> None:
    """Non-contiguous inputs with a bias too, which PyTorch multiplies in another way."""
    plain = nn.Linear(64, 96)
    ours = QuantLinear.from_linear(plain, INT8.only(*{"fprop", "dgrad", "wgrad"} - {gemm}))
    results = []
    for module in (ours, plain):
        x = tokens(*shape).movedim(-1, 0).contiguous().movedim(0, -1).requires_grad_()
        plain.zero_grad()
        output = module(x)
        output.backward(torch.ones_like(output))
        results.append({"fprop": output, "dgrad": x.grad, "wgrad": plain.weight.grad})
    assert torch.equal(results[0][gemm], results[1][gemm])  # type: ignore[arg-type]


def test_a_frozen_weight_keeps_no_input() -> None:
    ours = layer()
    ours.weight.requires_grad_(False)
    sizes: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.shape) or t, lambda t: t
    ):
        ours(tokens(40).requires_grad_())
    assert sizes == [ours.weight.shape]


@pytest.mark.parametrize("view", ["negated", "zeros without memory", "plain"])
def test_views_that_lie_otherwise(view: str) -> None:
    x = torch.view_as_complex(torch.randn(32, 64, 2)).conj().imag
    if view == "zeros without memory":
        x = torch._efficientzerotensor((32, 64))
    x = x.clone() if view == "plain" else x
    copied = x.resolve_neg().clone()
    assert torch.equal(fake_quantize(x, "mxint8"), fake_quantize(copied, "mxint8"))
    assert torch.equal(layer()(x), layer()(copied))


@pytest.mark.parametrize("first", ["inference", "device", "dtype"])
def test_a_rotation_first_used_elsewhere(first: str) -> None:
    """Each size and seed is built once in a process."""
    rotation = Rotation(64, seed={"inference": 101, "device": 102, "dtype": 103}[first])
    if first == "inference":
        with torch.inference_mode():
            lowbit.rotate(tokens(4), rotation)
    elif first == "device":
        with torch.device("meta"):
            rotation.matrix("cpu")
    else:
        torch.set_default_dtype(torch.float64)
        try:
            rotation.matrix("cpu")
        finally:
            torch.set_default_dtype(torch.float32)
    matrix = rotation.matrix("cpu")
    assert matrix.dtype is torch.float32 and not matrix.is_inference()
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(64))
    lowbit.rotate(tokens(4).requires_grad_(), rotation).sum().backward()


@pytest.mark.parametrize("bits", [(5, 3), (4, 4), (8, 2)])
def test_codes_of_more_than_eight_bits_are_refused(bits: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="bits"):
        FloatFormat(*bits, max=448.0)


@pytest.mark.parametrize("name", ["nvfp4", "nvint4"])
@pytest.mark.parametrize("bias", [False, True])
def test_scaled_products_are_rounded_once(name: str, bias: bool) -> None:
    ours = layer(QuantRecipe.uniform(name)).bfloat16()
    ours.bias.data.mul_(float(bias))
    x = tokens(256).bfloat16()
    a, b = (fake_quantize(t.detach().float(), name).double() for t in (x, ours.weight))
    exact = a @ b.t() + ours.bias.double()
    error, least = (ours(x).double() - exact).norm(), (exact.bfloat16().double() - exact).norm()
    assert error < 1.01 * least
