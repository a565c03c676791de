"""What layers hold on to changes time and memory, never a result."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import lowbit
from lowbit import Emulate, Keep, QuantLinear, QuantRecipe, Randomness, Reuse, Rounding, kernels
from lowbit.backend import Operand
from lowbit.definition.noise import Key
from lowbit.formats import NAMED, BlockFormat

RANDOM = replace(NAMED["mxfp8"], rounding=Rounding.STOCHASTIC)
RECIPES = {
    **{name: QuantRecipe.uniform(name) for name in ("mxint8", "mxfp8", "nvfp4", "nvint8", "int8")},
    "stochastic": QuantRecipe.uniform(RANDOM),
    "mixed": replace(QuantRecipe.uniform("mxfp4"), wgrad_input=None, dgrad_weight=None),
    "rotated": replace(
        QuantRecipe.uniform("mxint8"),
        **{f"{gemm}_rotation": lowbit.Rotation(32) for gemm in ("fprop", "dgrad", "wgrad")},
    ),
}


class Counting(Emulate):
    """Counts the operands that are made of matrices of this shape."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape, self.made = shape, 0

    def operand(self, x: Tensor, format: BlockFormat | None, dim: int, key: Key | None) -> Operand:
        self.made += format is not None and tuple(x.shape) == self.shape
        return super().operand(x, format, dim, key)


def _layer(recipe: QuantRecipe, keep: Keep, backend: lowbit.Backend | None = None) -> QuantLinear:
    torch.manual_seed(0)
    return QuantLinear.from_linear(
        torch.nn.Linear(64, 96), recipe, backend=backend, randomness=Randomness(1), keep=keep
    )


def _train(layer: QuantLinear, dtype: torch.dtype) -> Iterator[Tensor]:
    """Outputs and gradients of three steps with two micro-batches each, then a validation."""
    assert layer.randomness is not None
    optimizer = torch.optim.AdamW(layer.parameters(), 0.1, fused=True)  # counts no version
    generator, reuse = torch.Generator().manual_seed(2), Reuse()
    for step in range(3):
        for row in (0, 40):
            layer.randomness.set(step, row)
            x = torch.randn(40, 64, generator=generator, requires_grad=True)
            with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32), reuse:
                output = layer(x)
            output.float().square().mean().backward()
            yield from (output.detach(), x.grad)
        yield layer.weight.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        layer.randomness.set(max(step - 1, 0), 0)
        with reuse:  # and left before another of these generators enters its own
            output = layer(x)
        yield output.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "keep", [Keep(quantized_weights=True), Keep(quantized_inputs=True)], ids=str
)
def test_the_results_are_the_same(keep: Keep, recipe: str, dtype: torch.dtype) -> None:
    plain, kept = (_train(_layer(RECIPES[recipe], k), dtype) for k in (Keep(), keep))
    for expected, found in zip(plain, kept, strict=True):
        assert torch.equal(expected, found)


@pytest.mark.skipif(not kernels.enabled(), reason="no C++ compiler")
@pytest.mark.parametrize("name", ["mxint8", "nvint4", "int8"])
def test_the_integer_backend_multiplies_the_stored_codes(name: str) -> None:
    keep = Keep(quantized_weights=True, quantized_inputs=True)
    plain, kept = (
        _train(_layer(QuantRecipe.uniform(name), k, lowbit.Integer()), torch.bfloat16)
        for k in (Keep(), keep)
    )
    for expected, found in zip(plain, kept, strict=True):
        assert torch.equal(expected, found)


def test_a_weight_is_quantized_once_for_each_gemm_until_it_changes() -> None:
    recipe, backend = QuantRecipe.uniform("mxint8"), Counting((96, 64))
    layer, reuse = _layer(recipe, Keep(quantized_weights=True), backend), Reuse()

    def made_by_a_pass() -> int:
        before = backend.made
        with reuse:
            output = layer(torch.randn(32, 64, requires_grad=True))
        output.sum().backward()
        return backend.made - before

    assert [made_by_a_pass() for _ in range(3)] == [2, 0, 0]
    layer.load_state_dict(layer.state_dict())
    assert [made_by_a_pass() for _ in range(2)] == [2, 0]
    layer.set_recipe(QuantRecipe.uniform("mxfp8"))
    assert [made_by_a_pass() for _ in range(2)] == [2, 0]
    layer.weight.data = layer.weight.data + 1
    assert made_by_a_pass() == 2
    layer.keep = Keep()
    assert [made_by_a_pass() for _ in range(2)] == [2, 2]


@pytest.mark.parametrize(("name", "bytes_a_value"), [("mxfp8", 1 + 1 / 32), ("nvfp4", 1 + 1 / 16)])
def test_stored_inputs_take_a_byte_a_value_and_their_scales(
    name: str, bytes_a_value: float
) -> None:
    def saved(keep: Keep) -> int:
        sizes: list[int] = []
        layer = _layer(QuantRecipe.uniform(name), keep).bfloat16()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.nbytes) or t, lambda t: t
        ):
            layer(torch.randn(32, 64).bfloat16())
        return sum(sizes)

    weight, above = 96 * 64 * 2, 4 * (name == "nvfp4")
    assert saved(Keep()) == weight + 32 * 64 * 2
    assert saved(Keep(quantized_inputs=True)) == weight + 32 * 64 * bytes_a_value + above
