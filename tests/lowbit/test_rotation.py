"""The block Hadamard: orthogonal, against its textbook recursion, and invisible in a product."""

import math

import numpy as np
import pytest
import torch

from lowbit import Key, Rotation, rotate
from lowbit.definition.noise import uniform
from lowbit.definition.rotation import SIZES

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
