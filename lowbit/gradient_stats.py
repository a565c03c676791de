"""How well a quantized gradient stands for the unquantized one of the same batch.

Each returns a float64 scalar without a unit; `g` is the reference, `q` the quantized gradient.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

STALL_RATIO = 3**-0.5
"""Noise-to-gradient ratio above which training was seen to stall (2505.19115)."""


def cosine(g: Tensor, q: Tensor) -> Tensor:
    """<g, q> / (|g| |q|)."""
    g, q = _pair(g, q)
    return g.dot(q) / (_norm(g) * _norm(q))


def relative_l2(g: Tensor, q: Tensor) -> Tensor:
    """|q - g| / |g|."""
    g, q = _pair(g, q)
    return _norm(q - g) / _norm(g)


def norm_ratio(g: Tensor, q: Tensor) -> Tensor:
    """|q| / |g|."""
    g, q = _pair(g, q)
    return _norm(q) / _norm(g)


def signed_bias(g: Tensor, q: Tensor) -> Tensor:
    """mean(q - g) / mean |g|: the asymmetric integer range pulls it below zero (2510.25602)."""
    g, q = _pair(g, q)
    return (q - g).mean() / g.abs().mean()


def magnitude_bias(g: Tensor, q: Tensor) -> Tensor:
    """1 - 1/S with S = <g, g> / <g, q> (Quartet, 2505.14669): positive where q shrinks g.

    One draw; of a random quantizer average it over draws.
    """
    g, q = _pair(g, q)
    return 1 - g.dot(q) / g.dot(g)


def noise_to_gradient(g: Tensor, q: Tensor) -> Tensor:
    """std(q - g) over the root mean square of g; training stalls above STALL_RATIO."""
    g, q = _pair(g, q)
    noise = (q - g) - (q - g).mean()
    return _norm(noise) / _norm(g)


def mean_errors(g: Tensor, draws: Iterable[Tensor]) -> Iterator[float]:
    """|mean of the first B draws - g|² / |g|² for B = 1, 2, ...: the unbiasedness test.

    It falls as 1/B for an unbiased quantizer; a plateau is the squared bias (2601.22813).
    """
    total = torch.zeros_like(g, dtype=torch.float64)
    energy = g.double().square().sum()
    for count, draw in enumerate(draws, start=1):
        total += draw.double()
        yield float((total / count - g.double()).square().sum() / energy)


def _pair(g: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    if g.shape != q.shape:
        raise ValueError(f"shapes differ: {tuple(g.shape)} and {tuple(q.shape)}")
    return g.double().flatten(), q.double().flatten()


def _norm(g: Tensor) -> Tensor:
    return g.dot(g).sqrt()
