"""Layers that read the same input share what they make of it, and compute what they would alone."""

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowbit import (
    BlockFormat,
    Emulate,
    Keep,
    Key,
    Operand,
    QuantLinear,
    QuantRecipe,
    Randomness,
    Reuse,
    Rounding,
    block_format,
)
from lowbit.integer import Integer


class Counting(Emulate):
    """Counts quantizations, and sees the operands die."""

    def __init__(self) -> None:
        self.made: list[weakref.ref[Tensor]] = []

    def operand(self, x: Tensor, format: BlockFormat | None, dim: int, key: Key | None) -> Operand:
        operand = super().operand(x, format, dim, key)
        self.made.append(weakref.ref(operand.values))
        return operand


def siblings(recipe: QuantRecipe, backend: Any, keep: Keep = Keep()) -> list[QuantLinear]:
    torch.manual_seed(0)
    return [
        QuantLinear.from_linear(
            nn.Linear(64, 32),
            recipe,
            backend=backend,
            randomness=Randomness(0),
            index=index,
            keep=keep,
        )
        for index in range(3)
    ]


def passed(layers: list[QuantLinear], apart: bool, autocast: bool) -> list[Tensor]:
    """Outputs and gradients; `apart`: each layer reads a copy of the input of its own."""
    torch.manual_seed(1)
    leaf = torch.randn(40, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Reuse():
        input = leaf * 1.5
        outputs = [layer(input.clone() if apart else input) for layer in layers]
    for layer in layers:
        layer.zero_grad()
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    assert leaf.grad is not None
    return [*outputs, leaf.grad, *(layer.weight.grad for layer in layers)]  # type: ignore[list-item]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("backend", "recipe"),
    [(Emulate, "mxint8"), (Emulate, "nvfp4"), (Emulate, "mxfp8"), (Integer, "mxint8")],
)
@pytest.mark.parametrize("stored", [False, True])
def test_the_same_bits_as_alone(backend: Any, recipe: str, autocast: bool, stored: bool) -> None:
    layers = siblings(QuantRecipe.uniform(recipe), backend(), Keep(quantized_inputs=stored))
    for shared, alone in zip(
        passed(layers, False, autocast), passed(layers, True, autocast), strict=True
    ):
        assert torch.equal(shared, alone)


def test_an_input_is_quantized_once_for_all_and_forgotten_when_it_dies() -> None:
    """Under autocast for fprop and for wgrad; the BF16 input itself is not kept for backward."""
    backend = Counting()
    layers = siblings(QuantRecipe.uniform("mxint8"), backend)
    leaf = torch.randn(40, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), Reuse():
        input = leaf * 1.5
        outputs = [layer(input) for layer in layers]
        assert backend.made[1]() is not None
    assert len(backend.made) == 2 + len(layers)
    early, fprop, *weights = backend.made
    assert not any(weight() is not None for weight in weights)
    assert fprop() is None and early() is not None
    del outputs
    gc.collect()
    assert early() is None


def test_codes_that_wait_for_backward_are_shared_too() -> None:
    layers = siblings(QuantRecipe.uniform("mxint8"), Emulate(), Keep(quantized_inputs=True))
    input = torch.randn(40, 64, requires_grad=True) * 1.5
    places: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: places.append(x.data_ptr()) if x.element_size() == 1 else x, lambda x: x
    ):
        with Reuse():
            for layer in layers:
                layer(input)
    assert len(places) == 2 * len(layers) and len(set(places)) == 2  # codes and scales


def test_another_value_of_the_same_tensor_is_another_input() -> None:
    layer = siblings(QuantRecipe.uniform("mxint8"), Emulate())[0]
    leaf = torch.randn(40, 64, requires_grad=True)
    input = leaf * 1.0
    first = layer(input)
    with torch.no_grad():
        input.mul_(2)
    assert torch.equal(layer(input), layer(input.detach()))
    assert not torch.equal(layer(input), first)
    constant = torch.randn(40, 64)
    before = layer(constant)
    constant.data.mul_(2)  # autograd does not count this
    assert not torch.equal(layer(constant), before)


def test_stochastic_rounding_is_each_layers_own() -> None:
    recipe = QuantRecipe.uniform(replace(block_format("mxfp4"), rounding=Rounding.STOCHASTIC))
    layers = siblings(recipe, Emulate())
    for layer in layers[1:]:
        layer.weight = layers[0].weight
    input = torch.randn(40, 64, requires_grad=True) * 1.0
    with Reuse() as reuse:
        assert not torch.equal(layers[0](input), layers[1](input))
        assert not reuse.of_input(input, input.dtype)
