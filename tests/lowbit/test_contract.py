"""docs/layer.md's table, row by row, each with at least three uses: right, or refused in words.

Right is what fresh layers compute that share and keep nothing, bit for bit. What takes more than a
few lines (float64's double backward, every kind of checkpointing) is in test_layer.py.
"""

import copy
import io
import pickle
import re
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from lowbit import (
    Keep,
    QuantLinear,
    QuantRecipe,
    Randomness,
    Reuse,
    Rounding,
    bf16,
    block_format,
    convert_linears,
    fake_quantize,
)

INT8 = QuantRecipe.uniform("mxint8")
RANDOM = QuantRecipe.uniform(block_format("mxint8", rounding=Rounding.STOCHASTIC))
HELD = Keep(quantized_weights=True, quantized_inputs=True)
Program = Callable[[Any], Any]  #: of a net, returns tensors
Use = Callable[[], Any]


class Net(nn.Module):
    """Two siblings that read one input, and a third layer; `alone`: each reads a copy."""

    def __init__(self, alone: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.o = (nn.Linear(64, 64) for _ in range(3))
        self.alone = alone

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x)
        q, k = (part(h.clone() if self.alone else h) for part in (self.q, self.k))
        return self.o(q + k) + x  # type: ignore[no-any-return]


def net(recipe: QuantRecipe = INT8, keep: Keep | None = None, alone: bool = False) -> Any:
    return convert_linears(Net(alone), recipe, randomness=Randomness(0), keep=keep)


def tokens(*shape: int, grad: bool = False) -> Tensor:
    x = torch.randn(*shape or (32,), 64, generator=torch.Generator().manual_seed(1))
    return x.requires_grad_(grad)


def loss_of(model: Any, x: Tensor | None = None) -> Tensor:
    output: Tensor = model(tokens() if x is None else x)
    return output.float().square().mean()


def gradients(model: Any) -> list[Tensor]:
    return [p.grad for p in model.parameters()]


def right(
    program: Program, recipe: QuantRecipe = INT8, keep: Keep = HELD, reused: bool = True
) -> Use:
    """The same tensors from layers that share and keep within `Reuse`, and from lone ones."""

    def check() -> None:
        found = []
        for alone in (False, True):
            model = net(recipe, Keep() if alone else keep, alone)
            with Reuse() if reused and not alone else nullcontext():
                found.append(list(program(model)))
        assert found[0] and len(found[0]) == len(found[1])
        for ours, theirs in zip(*found, strict=True):
            assert torch.equal(ours, theirs)

    return check


def refused(act: Program, words: str, recipe: QuantRecipe = INT8) -> Use:
    """By an error that says what to do; the model computes afterwards as a new one does."""

    def check() -> None:
        model = net(recipe, HELD)
        with Reuse():
            with pytest.raises((RuntimeError, ValueError), match=words):
                act(model)
            assert torch.equal(model(tokens(grad=True)), net(recipe)(tokens(grad=True)))

    return check


# --- programs ------------------------------------------------------------------------------------


def steps(model: Any, make: Callable[..., Any] = torch.optim.AdamW, **how: Any) -> Any:
    optimizer = make(model.parameters(), 0.05, **how)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model).backward()
        yield from gradients(model)
        optimizer.step()
    yield model(tokens())


def probed(model: Any, probe: Callable[[], Any]) -> Any:
    with probe():
        yield model(tokens()).clone()
    yield from steps(model)


def accumulated(model: Any) -> Any:
    for x in (tokens(), tokens(40)):
        loss_of(model, x).backward()
    return gradients(model)


def twice(model: Any) -> Any:
    loss = loss_of(model)
    for last in (False, True):
        loss.backward(retain_graph=not last)
    return gradients(model)


def autocast(inside: bool, dtype: torch.dtype, around: bool = True) -> Program:
    def program(model: Any) -> Any:
        with torch.autocast("cpu", dtype, enabled=around):
            loss = loss_of(model)
        with torch.autocast("cpu", dtype, enabled=inside):
            loss.backward()
        return gradients(model)

    return program


def doubles(model: Any) -> Any:
    """FP64, which autocast leaves alone."""
    with torch.autocast("cpu", torch.bfloat16):
        output = model.double()(tokens().double())
    assert output.dtype is torch.float64
    output.sum().backward()
    return gradients(model)


def two_autocasts(model: Any) -> Any:
    """Both graphs open, one weight."""
    losses = [loss_of(model)]
    with torch.autocast("cpu", torch.bfloat16):
        losses.append(loss_of(model))
    for loss in losses:
        loss.backward()
        yield from [g.clone() for g in gradients(model)]


def penalty(model: Any) -> Any:
    x = tokens(grad=True)
    (g,) = torch.autograd.grad(loss_of(model, x), x, create_graph=True)
    g.square().sum().backward()
    return [x.grad, *gradients(model)]


def checkpointed(reentrant: bool, recipe: QuantRecipe | None = None) -> Program:
    def program(model: Any) -> Any:
        x = tokens(grad=True)
        y = checkpoint(model, x, use_reentrant=reentrant) if not model.alone else model(x)
        if recipe is not None:
            for layer in (model.q, model.k, model.o):
                layer.set_recipe(recipe)
        model.q.randomness.set(7, 99)
        y.square().mean().backward()
        return [x.grad, *gradients(model)]

    return program


def nested(model: Any) -> Any:
    x = tokens(grad=True)
    inner = lambda x: checkpoint(model, x, use_reentrant=False)  # noqa: E731
    y = model(x) if model.alone else checkpoint(inner, x, use_reentrant=False)
    model.q.randomness.set(7, 99)
    y.square().mean().backward()
    return [x.grad, *gradients(model)]


def other_way(model: Any) -> Any:
    """The lone model stays in its way."""
    with bf16.using("fp32"), torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model)
    with bf16.using("fp32" if model.alone else "native"):
        loss.backward()
    return gradients(model)


class Again(torch.autograd.Function):
    """Somebody's own checkpointing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, model: Any) -> Tensor:
        ctx.model = model
        ctx.save_for_backward(x)
        with torch.no_grad():
            return model(x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            ctx.model(x).backward(g)
        return x.grad, None


def again(model: Any) -> None:
    Again.apply(tokens(grad=True), model).sum().backward()  # type: ignore[no-untyped-call]


def again_after_a_recipe(model: Any) -> None:
    y: Any = Again.apply(tokens(grad=True), model)  # type: ignore[no-untyped-call]
    model.q.set_recipe(QuantRecipe.uniform("mxfp8"))
    try:
        y.sum().backward()
    finally:
        model.q.set_recipe(INT8)


def in_a_hook(model: Any) -> None:
    y = tokens(grad=True) * 1.0
    y.register_hook(lambda _: model(tokens()).detach())
    y.sum().backward()


def compiled(how: str, recipe: QuantRecipe = INT8, keep: Keep | None = None) -> Use:
    """Equal to eager, by a compiler that keeps the order of sums."""

    def check() -> None:
        torch._dynamo.reset()
        eager, model = net(recipe, keep), net(recipe, keep)
        run = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            losses = [loss_of(run), loss_of(eager)]
        for loss in losses:
            loss.backward()
        assert all(map(torch.equal, gradients(model), gradients(eager)))

    return check


def exported() -> None:
    model = net().eval()
    program = torch.export.export(model, (tokens(),))
    assert torch.equal(program.module()(tokens()), model(tokens()))


def forward_mode(model: Any) -> Any:
    with forward_ad.dual_level():
        return model(forward_ad.make_dual(tokens(), tokens()))


def functional(model: Any) -> Any:
    yield model(tokens())
    other = {name: p.detach() * 2 for name, p in model.named_parameters()}
    yield torch.func.functional_call(model, other, (tokens(),))
    yield model(tokens())


def assigned(model: Any) -> Any:
    for factor in (3.0, 0.5):
        state = {name: p * factor for name, p in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        yield model(tokens())


def averaged(model: Any) -> Any:
    """Validation of an average that is swapped in, as Lightning's callback does, and out."""
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for parameter in average.module.parameters():
        parameter.data.mul_(0.9)
    for _ in range(2):
        for own, other in zip(model.parameters(), average.module.parameters(), strict=True):
            own.data, other.data = other.data.clone(), own.data.clone()
        yield model(tokens())
    yield from steps(model)


def swapped(model: Any) -> Any:
    yield model(tokens())
    model.q.weight, model.k.weight = model.k.weight, model.q.weight
    yield model(tokens())


def by_hand(model: Any) -> Any:
    for _ in range(2):
        model.zero_grad()
        loss_of(model).backward()
        for p in model.parameters():
            p.data -= 0.1 * p.grad
        yield model(tokens())


def parametrized_later(model: Any) -> Any:
    yield model(tokens())
    nn.utils.parametrizations.weight_norm(model.o)
    loss_of(model).backward()
    yield from gradients(model)


def written(write: Callable[[Tensor], Any]) -> Program:
    def program(model: Any) -> Any:
        h = tokens(grad=True) * 1.0
        yield model.q(h)
        write(h)
        yield model.k(h.clone() if model.alone else h)

    return program


def in_threads(model: Any) -> Any:
    found: dict[int, Tensor] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: model(tokens(32 + i, grad=True))}))
        for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[i] for i in range(3)]


def copied(how: Callable[[Any], Any]) -> Program:
    def program(model: Any) -> Any:
        yield model(tokens(grad=True))
        other = how(model)
        with torch.no_grad():
            model.q.weight.mul_(2)
        yield from steps(other)

    return program


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def saves_no_more_than_its_weights() -> None:
    sizes = []
    for keep in (None, HELD):
        model = net(keep=keep)
        with Reuse():
            loss_of(model, tokens(grad=True)).backward()
        model.zero_grad()
        file = io.BytesIO()
        torch.save(model, file)
        sizes.append(len(file.getvalue()))
    assert abs(sizes[0] - sizes[1]) < 1000


def frozen(name: str) -> Program:
    def program(model: Any) -> Any:
        model.get_parameter(name).requires_grad_(False)
        loss_of(model).backward()
        return [g for g in gradients(model) if g is not None]

    return program


def lying(view: Callable[[], Tensor]) -> Use:
    def check() -> None:
        x = view()
        copied = x.resolve_neg().clone()
        assert torch.equal(net()(x), net()(copied))

    return check


def on_meta() -> None:
    model, x = net(keep=HELD).to("meta"), torch.empty(4, 64, device="meta", requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None and x.grad.is_meta


def without_operands(gemm: str) -> Use:
    """Bitwise nn.Linear's; rows, one token, and an input that lies by columns."""

    def check() -> None:
        plain = nn.Linear(64, 96)
        others = {"fprop", "dgrad", "wgrad"} - {gemm}
        ours = QuantLinear.from_linear(plain, INT8.only(*others))
        for x in (tokens(5, 3), tokens(1), tokens(6).t().contiguous().t()):
            found = []
            for module in (ours, plain):
                leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
                plain.zero_grad()
                y = module(leaf)
                y.backward(torch.ones_like(y))
                found.append({"fprop": y, "dgrad": leaf.grad, "wgrad": plain.weight.grad})
            assert torch.equal(found[0][gemm], found[1][gemm])  # type: ignore[arg-type]

    return check


def draws(move: Callable[[Randomness], Any], equal: bool) -> Use:
    def check() -> None:
        model = net(RANDOM)
        first = model(tokens())
        move(model.q.randomness)
        assert torch.equal(model(tokens()), first) is equal

    return check


def two_conversions() -> None:
    one, randomness = tokens(), Randomness(0)
    layers = [convert_linears(nn.Linear(64, 64), RANDOM, randomness=randomness) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    assert not torch.equal(layers[0](one), layers[1](one))


# --- the table -----------------------------------------------------------------------------------

NV, FP8 = QuantRecipe.uniform("nvint8"), QuantRecipe.uniform("mxfp8")
slow = "slow: "  # how the name of a use that compiles begins

CONTRACT: dict[str, dict[str, Use]] = {
    "training": {
        "steps": right(steps),
        "fused": right(lambda m: steps(m, fused=True)),
        "no_grad before": right(lambda m: probed(m, torch.no_grad)),
        "inference_mode before": right(lambda m: probed(m, torch.inference_mode)),
        "accumulation": right(accumulated),
        "retain_graph": right(twice),
    },
    "autocast": {
        "around forward": right(autocast(False, torch.bfloat16)),
        "around both": right(autocast(True, torch.bfloat16), NV),
        "around backward": right(autocast(True, torch.bfloat16, around=False)),
        "FP16": right(autocast(True, torch.float16), QuantRecipe.uniform("int8")),
        "two states open": right(two_autocasts, NV),
        "FP64": right(doubles),
    },
    "double backward": {
        "penalty": right(penalty, keep=Keep(True), reused=False),
        "penalty, nvint8": right(penalty, NV, Keep(True), reused=False),
        "penalty, mixed": right(penalty, FP8.only("fprop", "wgrad"), Keep(True), reused=False),
        "kept codes": refused(penalty, "compute this forward without them"),
    },
    "torch.utils.checkpoint": {
        "reentrant": right(checkpointed(True), RANDOM),
        "not reentrant": right(checkpointed(False), RANDOM),
        "another recipe since": right(checkpointed(False, FP8)),
        "the baseline since": right(checkpointed(True, QuantRecipe())),
        "nested": right(nested, RANDOM),
    },
    "another way of multiplying": {
        name: right(other_way, QuantRecipe.uniform(name)) for name in ("mxint8", "nvfp4", "mxfp8")
    },
    "another way of computing again": {
        "own Function, random": refused(again, "use torch.utils.checkpoint", RANDOM),
        "own Function, recipe": refused(again_after_a_recipe, "use torch.utils.checkpoint"),
        "hook": refused(in_a_hook, "use torch.utils.checkpoint", RANDOM),
    },
    "torch.compile": {
        f"{slow}plain": compiled(""),
        f"{slow}autocast": compiled("autocast", NV),
        f"{slow}kept codes": compiled("", keep=Keep(quantized_inputs=True)),
        f"{slow}export": exported,
    },
    "torch.func": {
        "grad": refused(lambda m: torch.func.grad(lambda x: m(x).sum())(tokens()), "autograd"),
        "vmap": refused(lambda m: torch.vmap(m)(tokens(3, 4)), "autograd"),
        "jvp": refused(lambda m: torch.func.jvp(m, (tokens(),), (tokens(),)), "autograd"),
        "jacrev": refused(lambda m: torch.func.jacrev(m)(tokens(1)), "autograd"),
        "forward AD": refused(forward_mode, r"backward\(\)"),
    },
    "torch.jit.trace": {
        "trace": refused(lambda m: torch.jit.trace(m, tokens()), "torch.export"),
        "trace_module": refused(
            lambda m: torch.jit.trace_module(m, {"forward": tokens()}), "torch.export"
        ),
        "fx": refused(fx.symbolic_trace, "is_leaf_module"),
        "fx of a layer": refused(lambda m: fx.symbolic_trace(m.q), "is_leaf_module"),
    },
    "functional_call": {
        "functional_call": right(functional),
        "load(assign)": right(assigned),
        "swap": right(swapped),
        "average": right(averaged, reused=False),
        "p.data -=": right(by_hand, reused=False),
        "parametrized later": right(parametrized_later, reused=False),
    },
    "writes to an input": {
        "data.clamp_": right(written(lambda h: h.data.clamp_(-0.1, 0.1)), reused=False),
        "data =": right(written(lambda h: setattr(h, "data", h.data * 2)), reused=False),
        "numpy": right(written(lambda h: h.detach().numpy().__imul__(3)), reused=False),
        "counted": right(written(lambda h: h.detach().mul_(3))),
    },
    "threads": {
        "threads": right(in_threads),
        "deepcopy": right(copied(copy.deepcopy)),
        "pickle": right(copied(lambda m: pickle.loads(pickle.dumps(m)))),
        "torch.save": right(copied(saved)),
        "size of torch.save": saves_no_more_than_its_weights,
    },
    "frozen weight": {
        "weight": right(frozen("q.weight")),
        "bias": right(frozen("k.bias")),
        "last": right(frozen("o.weight"), NV),
        "no tokens": right(lambda m: [m(tokens(0, grad=True)), m(tokens(2, 0))]),
        "meta": on_meta,
        "negated": lying(lambda: torch.view_as_complex(torch.randn(32, 64, 2)).conj().imag),
        "zero tensor": lying(lambda: torch._efficientzerotensor((32, 64))),
    },
    "a wrong width": {
        "width": refused(lambda m: m.q(torch.zeros(4, 32)), "expected"),
        "no tokens of a wrong width": refused(lambda m: m.q(torch.zeros(0, 32)), "expected"),
        "scalar": refused(lambda m: m.q(torch.zeros(())), "expected"),
        "list": refused(lambda m: m.q([1.0]), "takes a tensor"),
        "two dtypes": refused(lambda m: m.q(tokens().bfloat16()), "cast one"),
        "integers": refused(lambda m: m.q(tokens().long()), "cast one"),
        "complex": refused(lambda m: m.q(tokens().to(torch.complex64)), "cast one"),
        "nested": refused(
            lambda m: m.q(torch.nested.nested_tensor([tokens(4), tokens(2)])), "pad it"
        ),
        "sparse": refused(lambda m: m.q(tokens().to_sparse()), "to_dense"),
    },
    "without quantized operands": {g: without_operands(g) for g in ("fprop", "dgrad", "wgrad")},
    "Randomness": {
        "never set": draws(lambda _: None, equal=True),
        "another step": draws(lambda r: r.set(1, 0), equal=False),
        "another row": draws(lambda r: r.set(0, 32), equal=False),
        "two conversions": two_conversions,
    },
}
USES = [
    pytest.param(use, id=f"{row}: {name}", marks=[pytest.mark.slow] if slow in name else [])
    for row, uses in CONTRACT.items()
    for name, use in uses.items()
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use", USES)
def test_right_or_refused(use: Use) -> None:
    use()


def test_every_row_of_the_page_has_three_uses() -> None:
    page = (Path(__file__).parents[2] / "docs" / "layer.md").read_text()
    table = re.findall(r"^\| (?!use)(.+?) \|", page, re.MULTILINE)
    rows = [line.replace("`", "") for line in table]
    assert len(rows) == len(CONTRACT) > 0
    for row, (name, uses) in zip(rows, CONTRACT.items(), strict=True):
        assert name in row and len(uses) >= 3, (name, row)


def test_right_means_that_a_difference_is_seen() -> None:
    """The reference of `right` is not the thing itself: a write that `Reuse` forbids shows."""
    with pytest.raises(AssertionError):
        right(written(lambda h: h.data.clamp_(-0.1, 0.1)))()
    assert not torch.equal(fake_quantize(tokens(), "mxint8"), tokens())
