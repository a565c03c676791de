"""The block Hadamard: orthogonal, against its textbook recursion, and invisible in a product."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowbit import Key, QuantLinear, QuantRecipe, Randomness, Rotation, rotate
from lowbit.definition.noise import uniform
from lowbit.definition.rotation import SIZES
from lowbit.definition.transforms import Transform

every_rotation = pytest.mark.parametrize(
    "rotation", [Rotation(size, seed) for size in SIZES for seed in (None, 3)], ids=str
)


def _sylvester(size: int) -> np.ndarray:
    """(-1)^(number of ones in i & j), the closed form."""
    return np.array([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)])


@every_rotation
def test_the_matrix_is_signs_times_hadamard(rotation: Rotation) -> None:
    matrix = rotation.matrix().numpy()
    signs = matrix[:, 0] * math.sqrt(rotation.size)
    assert set(np.rint(signs)) == ({1.0} if rotation.seed is None else {1.0, -1.0})
    expected = np.rint(signs)[:, None] * _sylvester(rotation.size)
    np.testing.assert_allclose(matrix * math.sqrt(rotation.size), expected, rtol=1e-6)


def test_signs_are_those_of_the_seed() -> None:
    drawn = uniform((32,), Key.of(3)) < 0.5
    assert torch.equal(Rotation(32, 3).matrix()[:, 0] > 0, drawn)
    assert not torch.equal(Rotation(32, 3).matrix(), Rotation(32, 4).matrix())


@every_rotation
def test_the_inverse_restores(rotation: Rotation) -> None:
    """To the bit for sizes 16 and 64, whose 1/sqrt(size) is a power of two; else to FP32's."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-99, 100, (8, 2 * rotation.size), generator=generator).float()
    for dim, y in ((1, x), (0, x.t())):
        restored = rotate(rotate(y, rotation, dim), rotation, dim, inverse=True)
        if rotation.size in (16, 64):
            assert torch.equal(restored, y)
        else:
            torch.testing.assert_close(restored, y, rtol=0, atol=1e-4)


@every_rotation
def test_a_product_of_two_rotated_operands_is_unchanged(rotation: Rotation) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, 3 * rotation.size, generator=generator)
    b = torch.randn(7, 3 * rotation.size, generator=generator)
    product = rotate(a, rotation) @ rotate(b, rotation).t()
    torch.testing.assert_close(product, a @ b.t(), rtol=0, atol=1e-4)


def test_a_short_last_block_is_filled_and_kept_whole() -> None:
    a, b = torch.eye(5, 40), torch.ones(3, 40)
    rotated = rotate(a, Rotation(32)), rotate(b, Rotation(32))
    assert rotated[0].shape == (5, 64)
    torch.testing.assert_close(rotated[0] @ rotated[1].t(), a @ b.t())
    assert rotate(a.t(), Rotation(32), dim=0).shape == (64, 5)


def test_an_outlier_is_spread_over_its_block() -> None:
    x = torch.zeros(64)
    x[3] = 8.0
    y = rotate(x, Rotation(64, seed=1))
    assert y.abs().tolist() == [1.0] * 64


def test_an_unknown_size_lists_the_sizes() -> None:
    with pytest.raises(ValueError, match=r"size=48.*16, 32, 64, 128"):
        Rotation(48)


def test_signs_of_each_step_are_those_of_a_seed_that_the_step_tells() -> None:
    """Gradients too, of a step whose backward comes after the next has begun; all layers alike."""
    random = Randomness(7)
    x, weight, up = (torch.randn(*shape) for shape in ((8, 64), (32, 64), (8, 32)))
    recipe = replace(QuantRecipe.uniform("mxint4"), wgrad_rotation=Rotation(16, "step"))

    def gradient(recipe: QuantRecipe, step: int, then: int, index: int = 0) -> Tensor:
        layer = nn.Linear(64, 32, bias=False)
        layer.weight.data.copy_(weight)
        layer = QuantLinear.from_linear(layer, recipe, randomness=random, index=index)
        random.set(step, 0)
        y = layer(x)
        random.set(then, 0)
        y.backward(up)
        assert layer.weight.grad is not None
        return layer.weight.grad

    seeds = []
    for step in (0, 1, 2):
        random.set(step, 8)
        seeds.append(random.signs())
        drawn = replace(recipe, wgrad_rotation=Rotation(16, seeds[-1]))
        found = gradient(recipe, step, step + 1)
        assert torch.equal(found, gradient(drawn, step, step + 1))
        assert torch.equal(found, gradient(recipe, step, step, index=5))
    assert len({*seeds}) == 3
    assert not torch.equal(gradient(recipe, 0, 0), gradient(recipe, 1, 1))
    assert recipe.table()["wgrad_input"] == "mxint4 hadamard(16, signs step)"


TURNED = replace(QuantRecipe.uniform("mxint4"), fprop_rotation=Rotation(16, "step"))
STEP_REFUSED: dict[str, Callable[[], object]] = {
    "rotation seed='epoch', expected a number": lambda: Rotation(16, "epoch"),  # type: ignore[arg-type]
    "no matrix outside of training": lambda: Rotation(16, "step").matrix(),
    "has no matrix": lambda: Transform.of(Rotation(16, "step")),
    "signs of each step need randomness": lambda: QuantLinear.from_linear(
        nn.Linear(32, 32), TURNED
    ),
}


@pytest.mark.parametrize("message", STEP_REFUSED)
def test_signs_of_each_step_are_refused_where_there_is_no_step(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        STEP_REFUSED[message]()
