"""A random walk through uses of layers that share and keep: always the bits of fresh, lone ones."""

import copy
import threading
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowbit import Keep, QuantLinear, QuantRecipe, Randomness, Reuse, Rounding, block_format

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


class Walk(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.randomness, self.reuse = Randomness(5), Reuse()
        bases = [nn.Linear(WIDTH, WIDTH) for _ in range(3)]
        self.layers = [
            QuantLinear.from_linear(
                base, RECIPES[0], randomness=self.randomness, index=i, keep=Keep(True, False)
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

    @rule(
        tokens=st.sampled_from([1, 32, 40]),
        autocast=st.booleans(),
        reused=st.booleans(),
        codes=st.booleans(),
        kind=st.sampled_from([None, None, False, True]),
        write=st.booleans(),
        grad=st.booleans(),
        thread=st.booleans(),
    )
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
                outputs.append(self._pass(self._lone(), leaves[1], None, write, not write))

        if thread:
            worker = threading.Thread(target=compute)
            worker.start()
            worker.join()
        else:
            compute()
        assert torch.equal(*outputs)
        if grad:
            weights = [layer.weight for layer in self.layers]
            self.graphs.append(
                Graph(leaves, (outputs[0], outputs[1]), weights, reused, kind is not None)
            )

    @rule(which=st.integers(0, 9), autocast=st.booleans())
    def backward(self, which: int, autocast: bool) -> None:
        if not self.graphs:
            return
        graph = self.graphs.pop(which % len(self.graphs))
        found: list[Any] = []
        for leaf, output in zip(graph.leaves, graph.outputs, strict=True):
            saved = [p.grad for p in graph.weights]
            for p in graph.weights:
                p.grad = None
            try:
                with torch.autocast("cpu", enabled=autocast):
                    output.float().square().sum().backward()
                found.append([leaf.grad, *(p.grad for p in graph.weights)])
            except RuntimeError as error:
                found.append(error)  # a weight was changed in a way that autograd counts
            for p, grad in zip(graph.weights, saved, strict=True):
                p.grad = grad
        if not any(isinstance(one, RuntimeError) for one in found):
            assert all(map(torch.equal, *found))

    # --- changing ---------------------------------------------------------------------------

    def _unseen(self) -> None:
        """The owner of `reuse` breaks no promise."""
        self.reuse.forget()
        self.graphs = [graph for graph in self.graphs if not graph.reused]

    @rule(i=st.integers(0, 2), how=st.sampled_from(["mul_", "load", "assign", "step"]))
    def change(self, i: int, how: str) -> None:
        # under autocast PyTorch recomputes with the weight of then, whatever the layer is
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

    @rule(i=st.integers(0, 2), replaces=st.booleans())
    def write(self, i: int, replaces: bool) -> None:
        self._unseen()
        self.graphs = []  # PyTorch's own graphs read what is there by then
        weight = self.layers[i].weight
        if replaces:
            weight.data = weight.data * 0.75
        else:
            weight.data.mul_(0.75)

    @rule(i=st.integers(0, 2), recipe=st.sampled_from(RECIPES))
    def set_recipe(self, i: int, recipe: QuantRecipe) -> None:
        self.layers[i].set_recipe(recipe)

    @rule(step=st.integers(0, 3), row=st.integers(0, 99))
    def move_on(self, step: int, row: int) -> None:
        self.randomness.set(step, row)

    @rule()
    def swap(self) -> None:
        first, second = self.layers[:2]
        self.graphs = [graph for graph in self.graphs if not graph.checkpointed]
        first.weight, second.weight = second.weight, first.weight

    @rule()
    def copied(self) -> None:
        self.layers, self.randomness = copy.deepcopy((self.layers, self.randomness))


@pytest.mark.filterwarnings("ignore")
def test_a_short_walk() -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Walk, settings=settings(max_examples=10, stateful_step_count=20, derandomize=True)
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_walk_of_3000_operations() -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Walk, settings=settings(max_examples=60, stateful_step_count=50, derandomize=True)
    )
