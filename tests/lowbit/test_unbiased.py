"""The mean gradient over independent draws nears what it stands for as 1/B, or stops short."""

from dataclasses import replace

import pytest
import torch

from lowbit import QuantRecipe, Rotation, block_format
from lowbit.formats import Rounding
from lowbit.stats import GradientErrors, gradient_errors

DRAWS = 64
UNBIASED = pytest.approx(-1.0, abs=0.05)  # the chance of one seed; a plateau is above -0.4


def errors(recipe: QuantRecipe, exact: bool = False) -> GradientErrors:
    generator = torch.Generator().manual_seed(1)
    shapes = ((96, 128), (64, 128), (96, 64))
    input, weight, grad_output = (torch.randn(s, generator=generator) for s in shapes)
    grad_output *= torch.logspace(-3, 0, 96)[:, None]  # tokens of different sizes share blocks
    return gradient_errors(recipe, input, weight, grad_output, draws=DRAWS, exact=exact)


def recipe_of(name: str, stochastic: str, rotation: Rotation | None) -> QuantRecipe:
    """`stochastic`: which operands are rounded so: `gradients`, `all` or `none`."""
    nearest = block_format(name)
    random = replace(nearest, rounding=Rounding.STOCHASTIC)
    gradient = nearest if stochastic == "none" else random
    other = random if stochastic == "all" else nearest
    return QuantRecipe(
        *(nearest, nearest, gradient, other, gradient, other),
        dgrad_rotation=rotation,
        wgrad_rotation=rotation,
    )


SIGNS = Rotation(32, seed=3)
CASES = [("mxint8", None), ("mxint8", SIGNS), ("mxfp8", None), ("mxint4", None), ("mxfp4", SIGNS)]


@pytest.mark.parametrize(("name", "rotation"), CASES)
def test_stochastic_gradients(name: str, rotation: Rotation | None) -> None:
    """Unbiased with the nearest-rounded operands held; biased against the exact gradient."""
    held = errors(recipe_of(name, "gradients", rotation))
    exact = errors(recipe_of(name, "gradients", rotation), exact=True)
    all_random = errors(recipe_of(name, "all", rotation), exact=True)
    for gradient in ("grad_input", "grad_weight"):
        assert held.slope(gradient) == UNBIASED
        assert exact.slope(gradient) > -0.4
        assert all_random.slope(gradient) == UNBIASED


@pytest.mark.parametrize("rotation", [None, Rotation(32)], ids=["plain", "rotated"])
def test_nearest_is_one_value_and_no_nearer_for_averaging(rotation: Rotation | None) -> None:
    found = errors(recipe_of("mxint8", "none", rotation), exact=True)
    assert found.draws == (1, 2, 4, 8, 16, 32, 64)
    for gradient in (found.grad_input, found.grad_weight):
        assert gradient[0] > 1e-6
        assert max(gradient) / min(gradient) == pytest.approx(1.0, abs=1e-6)


def test_a_scale_that_clips_is_biased() -> None:
    """The floor rule saturates the largest values, whatever the rounding."""
    from lowbit import ScaleRule

    format = block_format("mxfp4", rounding=Rounding.STOCHASTIC, scale_rule=ScaleRule.FLOOR)
    found = errors(QuantRecipe.uniform(format), exact=True)
    assert found.slope("grad_weight") > -0.8
