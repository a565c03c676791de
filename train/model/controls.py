"""Controls: BF16 runs with a disturbance but no quantization, for the rule to be tried on."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from lowbit import (
    BlockFormat,
    Emulate,
    Key,
    LayerPolicy,
    Operand,
    QuantRecipe,
    Rounding,
    fake_quantize,
)
from lowbit.backend import PlainOperand, one_by_one
from lowbit.definition.noise import uniform
from lowbit.recipe import OPERANDS

Control = Literal["perturbed", "noise"]
PERTURBATION = 1e-6  # standard deviation of what the weights of `perturbed` are moved by


@torch.no_grad()
def perturb(model: nn.Module, seed: int) -> None:
    """Add normal noise of PERTURBATION to every parameter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(noise.to(parameter.device), alpha=PERTURBATION)


class SignedError(Emulate):
    """In place of Q(x): x + s (Q(x) - x), s = -1 or 1 at random for each element.

    The size of every element's error is the recipe's and its mean is zero, so that what is left of
    a recipe's gap beyond this control's comes from what its errors have in common.
    """

    name = "signed_error"

    def operand(self, x: Tensor, format: BlockFormat | None, dim: int, key: Key | None) -> Operand:
        """`x` plus its error with a random sign."""
        if format is None:
            return PlainOperand(x)
        assert key is not None  # `with_keys` saw to it
        nearest = replace(format, rounding=Rounding.NEAREST)
        error = fake_quantize(x, nearest, dim) - x
        sign = 1 - 2 * (uniform(tuple(x.shape), key, x.device) < 0.5).to(x.dtype)
        return Operand(x + sign * error)

    operands = one_by_one  # each with signs of its own


def with_keys(policy: LayerPolicy) -> LayerPolicy:
    """The same policy with stochastic formats, for which every operand gets a stream of its own."""

    def change(recipe: QuantRecipe) -> QuantRecipe:
        formats = {name: recipe.format(name) for name in OPERANDS}
        stochastic = {
            name: replace(format, rounding=Rounding.STOCHASTIC)
            for name, format in formats.items()
            if format is not None
        }
        return replace(recipe, **stochastic)  # type: ignore[arg-type]  # keys are fields

    return _mapped(policy, change)


def _mapped(policy: LayerPolicy, change: Callable[[QuantRecipe], QuantRecipe]) -> LayerPolicy:
    rules = tuple(replace(rule, recipe=change(rule.recipe)) for rule in policy.rules)
    return replace(policy, recipe=change(policy.recipe), rules=rules)
