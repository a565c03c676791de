"""The unbiasedness test of a recipe's backward pass (Quartet II, arXiv 2601.22813)."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.backend import Emulate
from lowbit.definition.noise import Key
from lowbit.formats import Rounding
from lowbit.operands import LayerNumerics, Operands
from lowbit.recipe import GEMMS, QuantRecipe


@dataclass(frozen=True)
class GradientErrors:
    """|mean of B draws - reference|² / |reference|², for B = 1, 2, 4, ..."""

    draws: tuple[int, ...]
    grad_input: tuple[float, ...]
    grad_weight: tuple[float, ...]

    def slope(self, gradient: str) -> float:
        """Of log error over log B, first to last: -1 means unbiased, 0 a plateau, that is bias."""
        errors: tuple[float, ...] = getattr(self, gradient)
        return math.log(errors[-1] / errors[0]) / math.log(self.draws[-1] / self.draws[0])


def gradient_errors(
    recipe: QuantRecipe,
    input: Tensor,
    weight: Tensor,
    grad_output: Tensor,
    *,
    draws: int = 256,
    exact: bool = False,
    seed: int = 0,
) -> GradientErrors:
    """How the mean of a layer's gradients over independent draws nears the gradient it stands for.

    `input` [tokens, in], `weight` [out, in], `grad_output` [tokens, out]. The reference keeps every
    operand that is rounded deterministically at its quantized value, and takes those rounded
    stochastically as they are; `exact` takes them all as they are. `draws` is a power of two.
    """
    tensors = tuple(x.detach().float() for x in (input, weight, grad_output))
    reference = LayerNumerics(QuantRecipe() if exact else _deterministic(recipe), Emulate())
    targets = [x.double() for x in _gradients(reference, *tensors)]
    sums = [torch.zeros_like(target) for target in targets]
    counts: list[int] = []
    errors: list[list[float]] = [[], []]
    for draw in range(draws):
        numerics = LayerNumerics(recipe, Emulate(), Key.of(seed).fold(draw))
        for total, found in zip(sums, _gradients(numerics, *tensors), strict=True):
            total += found
        count = draw + 1
        if count & draw == 0:  # a power of two
            counts.append(count)
            for row, total, target in zip(errors, sums, targets, strict=True):
                error = (total / count - target).square().sum() / target.square().sum()
                row.append(float(error))
    return GradientErrors(tuple(counts), tuple(errors[0]), tuple(errors[1]))


def _gradients(
    numerics: LayerNumerics, input: Tensor, weight: Tensor, grad_output: Tensor
) -> tuple[Tensor, Tensor]:
    """Those of input and weight."""
    q = Operands(numerics).read_once(grad_output)
    dgrad = q("dgrad_grad_output", grad_output), q("dgrad_weight", weight)
    wgrad = q("wgrad_grad_output", grad_output).T, q("wgrad_input", input)
    return q.matmul(*dgrad, torch.float32), q.matmul(*wgrad, torch.float32)


def _deterministic(recipe: QuantRecipe) -> QuantRecipe:
    """`recipe` with the stochastically rounded operands left as they are."""
    changes: dict[str, None] = {}
    for gemm, operands in GEMMS.items():
        formats = {name: recipe.format(name) for name in operands}
        kept = [f for f in formats.values() if f and f.rounding is not Rounding.STOCHASTIC]
        changes |= {name: None for name, f in formats.items() if f not in kept}
        if not kept:
            changes[f"{gemm}_rotation"] = None  # of two unquantized operands: nothing
    return replace(recipe, **changes)  # type: ignore[arg-type]  # keys are fields
