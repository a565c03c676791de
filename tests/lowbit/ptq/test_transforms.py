"""Transforms against scipy's matrices, and against the product that they must leave alone."""

import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import torch

from lowbit import Rotation, Transform, rotate, transformed
from lowbit.definition.transforms import NAMES

SIZES = (16, 24, 32, 128)
RANDOM = NAMES[5:]
TWO = ("hadamard", "gsr", "fast_food")
CASES = [(n, s) for n in NAMES for s in SIZES if s != 24 or n not in TWO]


def _transform(name: str, size: int) -> Transform:
    return Transform(name, size, 11 if name in RANDOM else None)


@pytest.mark.parametrize(("name", "size"), CASES)
def test_the_product_is_unchanged(name: str, size: int) -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(50, size * 3, generator=g), torch.randn(30, size * 3, generator=g)
    turned = _transform(name, size)
    left, right = transformed(a, turned), transformed(b, turned, inverse_transpose=True)
    expected = a.double() @ b.double().T
    assert float((left @ right.T - expected).norm() / expected.norm()) < 1e-5
    assert name == "identity" or not torch.equal(left, a)
    identity = turned.matrix().double() @ turned.inverse_transpose().double().T
    assert float((identity - torch.eye(size)).abs().max()) < 1e-4


@pytest.mark.parametrize("size", SIZES)
def test_matrices_are_scipys(size: int) -> None:
    eye = np.eye(size)
    rows = {name: Transform(name, size).matrix().numpy() for name in ("dct", "dst")}
    assert np.allclose(rows["dct"], scipy.fft.dct(eye, norm="ortho"), atol=1e-7)
    assert np.allclose(rows["dst"], scipy.fft.dst(eye, norm="ortho"), atol=1e-7)
    if size & (size - 1):
        return
    natural = scipy.linalg.hadamard(size) / np.sqrt(size)
    assert np.allclose(Transform("hadamard", size).matrix().numpy(), natural, atol=1e-7)
    changes = (np.diff(np.sign(natural), axis=0) != 0).sum(0)
    walsh = Transform("gsr", size).matrix().numpy()
    assert np.allclose(walsh, natural[:, np.argsort(changes)], atol=1e-7)
    assert (np.diff(np.sign(walsh), axis=0) != 0).sum(0).tolist() == list(range(size))


@pytest.mark.parametrize("seed", [None, 0, 7])
@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_a_recipes_rotation_is_one_of_them_bit_for_bit(size: int, seed: int | None) -> None:
    rotation, x = Rotation(size, seed), torch.randn(3, 256)
    turned = Transform.of(rotation)
    assert torch.equal(transformed(x, turned), rotate(x, rotation))
    assert torch.equal(transformed(x, turned, inverse_transpose=True), rotate(x, rotation))


@pytest.mark.parametrize("name", RANDOM)
def test_seeds_tell_random_ones_apart_and_a_given_matrix_is_taken(name: str) -> None:
    one, same, other = (Transform(name, 32, seed).matrix() for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    trained = torch.randn(32, 32) + 6 * torch.eye(32)
    assert torch.equal(Transform(name, 32, 1, given=trained).matrix(), trained)


def test_kronecker_is_of_two_factors() -> None:
    matrix = Transform("kronecker", 24, 3).matrix().reshape(4, 6, 4, 6)
    flat = matrix.permute(0, 2, 1, 3).reshape(16, 36)
    assert int(torch.linalg.matrix_rank(flat, rtol=1e-5)) == 1


@pytest.mark.parametrize(
    ("name", "size", "seed", "said"),
    [
        ("fourier", 16, None, "unknown transform 'fourier'"),
        ("hadamard", 24, None, "a power of two"),
        ("dct", 0, None, "positive"),
        ("dct", 16, 3, "has no seed"),
        ("full", 16, None, "needs a seed"),
    ],
)
def test_what_is_no_transform_is_refused(name: str, size: int, seed: int | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Transform(name, size, seed)


def test_a_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="transform size=32 does not divide a tensor's 48 inputs"):
        transformed(torch.ones(2, 48), Transform("dct", 32))
