"""Invertible matrices for both operands of a GEMM along its contraction axis, in blocks.

    (A M)(B M⁻ᵀ)ᵀ = A Bᵀ

| name              | M, of `size` x `size`                                            | seed |
|-------------------|------------------------------------------------------------------|------|
| identity          | I                                                                | none |
| hadamard          | diag(signs) H / sqrt(size), H Sylvester's; signs +1 without seed | any  |
| dct, dst          | orthonormal DCT-II, DST-II                                       | none |
| gsr               | H / sqrt(size), columns by number of sign changes (Walsh)        | none |
| fast_food         | S H G P H B / size: Fastfood (Le, Sarlos, Smola 2013) with σ = 1 | one  |
| full              | random orthogonal                                                | one  |
| kronecker         | L ⊗ R, both random orthogonal, as square as `size` factors       | one  |
| identity_low_rank | I + B A, rank size / 8                                           | one  |

Those that no library's last bit decides come from name, size and seed; the others, and any matrix
that was trained, are stored beside the weights (`Transform.is_stored`) and given back as `given`.
"""

import math
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from lowbit.definition.blocks import from_blocks, to_blocks
from lowbit.definition.noise import Key, uniform
from lowbit.definition.rotation import Rotation, hadamard

_PLAIN = ("identity", "hadamard", "dct", "dst", "gsr")
_RANDOM = ("fast_food", "full", "kronecker", "identity_low_rank")
_POWERS_OF_TWO = ("hadamard", "gsr", "fast_food")
NAMES = (*_PLAIN, *_RANDOM)


@dataclass(frozen=True)
class Transform:
    """M and its inverse-transpose; ValueError for a size or a seed that the name has no use for."""

    name: str
    size: int
    seed: int | None = None
    given: Tensor | None = field(default=None, compare=False, repr=False)
    """FP32 [size, size]: M itself, of a stored transform."""

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"unknown transform {self.name!r}, expected one of {', '.join(NAMES)}")
        if self.size < 1 or (self.name in _POWERS_OF_TWO and self.size & (self.size - 1)):
            kind = "a power of two" if self.name in _POWERS_OF_TWO else "positive"
            raise ValueError(f"transform size={self.size}: that of {self.name} is {kind}")
        if (self.seed is not None) != self.is_stored and self.name != "hadamard":
            wanted = "needs a seed" if self.is_stored else "has no seed"
            raise ValueError(f"transform {self.name} with seed={self.seed}: it {wanted}")
        if self.given is not None and self.given.shape != (self.size, self.size):
            raise ValueError(f"a matrix of shape {tuple(self.given.shape)} for size={self.size}")

    @classmethod
    def of(cls, rotation: Rotation) -> "Transform":
        """The rotation of a recipe, bit for bit."""
        return cls("hadamard", rotation.size, rotation.drawn_seed)

    @property
    def is_stored(self) -> bool:
        """Whether its matrix has to be kept beside the weights."""
        return self.name in _RANDOM

    @property
    def is_orthogonal(self) -> bool:
        """Whether M⁻ᵀ is M."""
        return self.given is None and self.name not in ("fast_food", "identity_low_rank")

    def matrix(self, device: torch.device | str | None = None) -> Tensor:
        """M, FP32 [size, size]."""
        if self.given is not None:
            return self.given.to(device or self.given.device)
        return _kept(self.name, self.size, self.seed).to(device or "cpu")

    def inverse_transpose(self, device: torch.device | str | None = None) -> Tensor:
        """M⁻ᵀ, FP32 [size, size]; computed in FP64."""
        if self.is_orthogonal:
            return self.matrix(device)
        return self.matrix("cpu").double().inverse().T.float().contiguous().to(device or "cpu")

    def check_width(self, width: int, what: str) -> None:
        """ValueError unless `size` divides the width that it meets in `what`."""
        if width % self.size:
            raise ValueError(f"transform size={self.size} does not divide {what}'s {width} inputs")


def transformed(x: Tensor, transform: Transform, *, inverse_transpose: bool = False) -> Tensor:
    """`x` M in FP32 on each run of `size` values of the last axis, or `x` M⁻ᵀ (for weights).

    >>> x, dct = torch.eye(24), Transform("dct", 8)
    >>> y = transformed(x, dct) @ transformed(x, dct, inverse_transpose=True).T
    >>> bool((y - x).abs().max() < 1e-6)
    True
    """
    if transform.name == "identity":
        return x.float()
    transform.check_width(x.shape[-1], "a tensor")
    matrix = transform.inverse_transpose if inverse_transpose else transform.matrix
    blocks, inside = to_blocks(x.float(), transform.size, -1)
    return from_blocks(blocks @ matrix(x.device), inside, tuple(x.shape))


@cache
def _kept(name: str, size: int, seed: int | None) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return _built(name, size, seed).float().contiguous()


def _built(name: str, size: int, seed: int | None) -> Tensor:
    if name == "hadamard":
        return hadamard(size, seed)
    if name == "gsr":
        natural = hadamard(size)
        changes = (natural[1:] * natural[:-1] < 0).sum(0)
        return natural[:, changes.argsort()]
    key = Key.of(seed or 0)
    match name:
        case "identity":
            return torch.eye(size)
        case "dct":
            return _cosines(size)
        case "dst":
            return _sines(size)
        case "full":
            return _orthogonal(size, key)
        case "kronecker":
            left = max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0)
            return torch.kron(
                _orthogonal(left, key.fold(0)), _orthogonal(size // left, key.fold(1))
            )
        case "identity_low_rank":
            rank = max(1, size // 8)
            b, a = _normal((size, rank), key.fold(0)), _normal((rank, size), key.fold(1))
            return torch.eye(size, dtype=torch.float64) + b @ a / size
        case _:
            return _fast_food(size, key)


def _cosines(size: int) -> Tensor:
    i, k = torch.arange(size).double()[:, None], torch.arange(size).double()
    scale = torch.where(k == 0, math.sqrt(1 / size), math.sqrt(2 / size))
    return scale * torch.cos(math.pi * (2 * i + 1) * k / (2 * size))


def _sines(size: int) -> Tensor:
    i, k = torch.arange(size).double()[:, None], torch.arange(size).double()
    scale = torch.where(k == size - 1, math.sqrt(1 / size), math.sqrt(2 / size))
    return scale * torch.sin(math.pi * (2 * i + 1) * (k + 1) / (2 * size))


def _normal(shape: tuple[int, int], key: Key) -> Tensor:
    """Standard normal numbers, FP64 (Box and Muller)."""
    radius = (-2 * torch.log1p(-uniform(shape, key.fold(0)).double())).sqrt()
    return radius * torch.cos(2 * math.pi * uniform(shape, key.fold(1)).double())


def _orthogonal(size: int, key: Key) -> Tensor:
    q: Tensor
    q, r = torch.linalg.qr(_normal((size, size), key))
    return q.mul_(r.diagonal().sign())  # which makes it uniform over orthogonal matrices


def _fast_food(size: int, key: Key) -> Tensor:
    """Rows as long as those of a matrix of normal numbers, divided by sqrt(size).

    No number of G is nearer to zero than 0.1, so that FP32 can invert what is made of them.
    """
    h = hadamard(size).double()
    signs = torch.where(uniform((size,), key.fold(0)) < 0.5, 1.0, -1.0).double()
    gauss = _normal((1, size), key.fold(1))[0]
    gauss = gauss.abs().clamp(min=0.1).copysign(gauss)
    order = uniform((size,), key.fold(2)).argsort()
    lengths: Tensor = _normal((size, size), key.fold(3)).norm(dim=1) / gauss.norm()
    return lengths[:, None] * (h * gauss) @ (h[order] * signs)
