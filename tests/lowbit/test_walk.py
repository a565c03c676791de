"""A random walk through uses of layers that share and keep: always the bits of fresh, lone ones.

Its operations: forward (checkpointed in both ways, in no_grad, under autocast, in another thread,
with writes to `.data` between siblings), backward (the same), weights changed in place, through
`.data`, by load_state_dict, by an optimizer and swapped, copies, other recipes and random numbers.
"""

import copy
import random
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowbit import (
    Emulate,
    Keep,
    QuantLinear,
    QuantRecipe,
    Randomness,
    Reuse,
    Rounding,
    block_format,
)

RANDOM = QuantRecipe.uniform(block_format("mxint8", rounding=Rounding.STOCHASTIC))
RECIPES = [
    *(QuantRecipe.uniform(name) for name in ("mxint8", "nvfp4", "nvint8")),
    RANDOM,
    replace(QuantRecipe.uniform("mxfp8"), wgrad_input=None, dgrad_weight=None),
    QuantRecipe(),
]
WIDTH = 32


@dataclass
class Graph:
    """Two computations of one thing, not yet differentiated."""

    leaves: tuple[Tensor, Tensor]
    outputs: tuple[Tensor, Tensor]
    weights: list[nn.Parameter]
    reused: bool
    checkpointed: bool


def _in_thread(work: Callable[[], Any], another: bool) -> None:
    if not another:
        work()
        return
    failed: list[BaseException] = []

    def caught() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=caught)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


class Walk:
    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()  #: what came of operations
        torch.manual_seed(0)
        self.randomness, self.reuse = Randomness(5), Reuse()
        bases = [nn.Linear(WIDTH, WIDTH) for _ in range(3)]
        backend = Emulate()  # one: else they share nothing
        self.layers = [
            QuantLinear.from_linear(
                base, RECIPES[0], backend=backend, randomness=self.randomness, index=i
            )
            for i, base in enumerate(bases)
        ]
        self.graphs: list[Graph] = []
        self.draws = 0

    # --- computing --------------------------------------------------------------------------

    def _lone(self) -> list[QuantLinear]:
        """With the same parameters, and nothing else in common."""
        found = []
        for i, own in enumerate(self.layers):
            base = nn.Linear(WIDTH, WIDTH)
            base.weight, base.bias = own.weight, own.bias
            randomness = copy.deepcopy(self.randomness)
            found.append(QuantLinear.from_linear(base, own.recipe, randomness=randomness, index=i))
        return found

    def _pass(
        self, layers: list[QuantLinear], x: Tensor, kind: bool | None, write: bool, alone: bool
    ) -> Tensor:
        def block(x: Tensor) -> Tensor:
            h = torch.tanh(x)
            parts = []
            for layer in layers[:2]:
                parts.append(layer(h.clone() if alone else h))
                if write:
                    h.data.clamp_(-0.5, 0.5)
            return layers[2](sum(parts)) + x

        return block(x) if kind is None else checkpoint(block, x, use_reentrant=kind)  # type: ignore[no-any-return]

    def forward(
        self, tokens: int, autocast: bool, reused: bool, codes: bool, kind: Any, write: bool,
        grad: bool, thread: bool,
    ) -> None:  # fmt: skip
        write = write and not reused and kind is None
        self.draws += 1
        x = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(self.draws))
        leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
        for layer in self.layers:
            layer.keep = Keep(True, codes and not write)
        outputs: list[Tensor] = []

        def compute() -> None:
            with torch.set_grad_enabled(grad), torch.autocast("cpu", enabled=autocast):
                with self.reuse if reused else nullcontext():
                    outputs.append(self._pass(self.layers, leaves[0], kind, write, False))
                # computed again as well: with the weights of then, as PyTorch does
                outputs.append(self._pass(self._lone(), leaves[1], kind, write, not write))

        _in_thread(compute, thread)
        assert torch.equal(*outputs)
        self.seen["forward"] += 1
        if grad:
            weights = [layer.weight for layer in self.layers]
            self.graphs.append(
                Graph(leaves, (outputs[0], outputs[1]), weights, reused, kind is not None)
            )

    def backward(self, which: int, autocast: bool, thread: bool) -> None:
        if not self.graphs:
            return
        graph = self.graphs.pop(which % len(self.graphs))
        found: list[Any] = []
        for leaf, output in zip(graph.leaves, graph.outputs, strict=True):
            saved = [p.grad for p in graph.weights]
            for p in graph.weights:
                p.grad = None

            def compute(output: Tensor = output) -> None:
                with torch.autocast("cpu", enabled=autocast):
                    output.float().square().sum().backward()

            try:
                _in_thread(compute, thread)
                found.append([leaf.grad, *(p.grad for p in graph.weights)])
            except RuntimeError as error:
                found.append(error)  # a weight was changed in a way that autograd counts
            for p, grad in zip(graph.weights, saved, strict=True):
                p.grad = grad
        refused = [isinstance(one, RuntimeError) for one in found]
        self.seen["refused" if any(refused) else "backward"] += 1
        assert refused[0] or not refused[1], found[1]  # the lone ones see less, not more
        if not any(refused):
            assert all(map(torch.equal, *found))

    # --- changing ---------------------------------------------------------------------------

    def _unseen(self) -> None:
        """The owner of `reuse` breaks no promise."""
        self.reuse.forget()
        self.graphs = [graph for graph in self.graphs if not graph.reused]

    def change(self, i: int, how: str) -> None:
        if how == "assign":  # the lone layers keep the weight that is repeated with
            self.graphs = [graph for graph in self.graphs if not graph.checkpointed]
        layer = self.layers[i]
        state = {name: value * 1.25 for name, value in layer.state_dict().items()}
        if how == "mul_":
            with torch.no_grad():
                layer.weight.mul_(1.25)
        elif how == "step":
            layer.weight.grad = torch.ones_like(layer.weight)
            torch.optim.AdamW([layer.weight], 0.1, fused=True).step()
            self.graphs = []  # fused: counted by nobody
        else:
            layer.load_state_dict(state, assign=how == "assign")

    def write(self, i: int, replaces: bool) -> None:
        self._unseen()
        self.graphs = []  # PyTorch's own graphs read what is there by then
        weight = self.layers[i].weight
        if replaces:
            weight.data = weight.data * 0.75
        else:
            weight.data.mul_(0.75)

    def set_recipe(self, i: int, recipe: QuantRecipe) -> None:
        self.layers[i].set_recipe(recipe)

    def move_on(self, step: int, row: int) -> None:
        self.randomness.set(step, row)

    def swap(self) -> None:
        first, second = self.layers[:2]
        self.graphs = [graph for graph in self.graphs if not graph.checkpointed]
        first.weight, second.weight = second.weight, first.weight

    def copied(self) -> None:
        self.layers, self.randomness = copy.deepcopy((self.layers, self.randomness))


_YES = [False, True]
_LAYER = [0, 1, 2]
#: name -> how often, and what its arguments are drawn from
OPERATIONS: dict[str, tuple[int, dict[str, list[Any]]]] = {
    "forward": (10, {
        "tokens": [1, 32, 40], "autocast": _YES, "reused": [True, True, False], "codes": _YES,
        "kind": [None, None, False, True], "write": _YES, "grad": [True, True, True, False],
        "thread": [False, False, True],
    }),
    "backward": (8, {"which": [*range(10)], "autocast": _YES, "thread": [False, False, True]}),
    "change": (2, {"i": _LAYER, "how": ["mul_", "load", "assign", "step"]}),
    "write": (1, {"i": _LAYER, "replaces": _YES}),
    "set_recipe": (3, {"i": _LAYER, "recipe": RECIPES}),
    "move_on": (3, {"step": [0, 1, 2, 3], "row": [0, 32, 99]}),
    "swap": (1, {}),
    "copied": (1, {}),
}  # fmt: skip


def walk(seed: int, operations: int) -> Counter[str]:
    """So many operations, the same for the same seed; what came of them."""
    draw, machine = random.Random(seed), Walk()
    weights = [weight for weight, _ in OPERATIONS.values()]
    for number in range(operations):
        (name,) = draw.choices([*OPERATIONS], weights)
        arguments = {key: draw.choice(found) for key, found in OPERATIONS[name][1].items()}
        try:
            getattr(machine, name)(**arguments)
        except BaseException as error:
            error.add_note(f"walk({seed}, ...), operation {number}: {name} {arguments}")
            raise
    return machine.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(3))
def test_a_short_walk(seed: int) -> None:
    seen = walk(seed, 100)
    assert seen["forward"] > 20 and seen["backward"] > 10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_walk_of_3000_operations() -> None:
    """Most gradients are compared, not refused."""
    seen = sum((walk(seed, 300) for seed in range(100, 110)), Counter[str]())
    assert seen["forward"] > 800 and seen["backward"] > 2 * seen["refused"]
