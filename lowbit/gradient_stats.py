"""How well a quantized gradient stands for the unquantized one of the same batch.

`g` is the reference, `q` the quantized gradient; statistics are float64 scalars without a unit.
"""

from dataclasses import dataclass

from torch import Tensor

STALL_RATIO = 3**-0.5
"""Noise-to-gradient ratio above which training was seen to stall (2505.19115)."""


@dataclass(frozen=True)
class GradientError:
    """Sums over the elements of two gradients, float64 scalars: all the statistics follow."""

    gg: Tensor
    gq: Tensor
    qq: Tensor
    noise: Tensor  #: of (q - g)²
    drift: Tensor  #: of q - g
    magnitude: Tensor  #: of |g|
    count: int

    @property
    def cosine(self) -> Tensor:
        """<g, q> / (|g| |q|)."""
        return self.gq / (self.gg.sqrt() * self.qq.sqrt())

    @property
    def relative_l2(self) -> Tensor:
        """|q - g| / |g|."""
        return (self.noise / self.gg).sqrt()

    @property
    def norm_ratio(self) -> Tensor:
        """|q| / |g|."""
        return (self.qq / self.gg).sqrt()

    @property
    def signed_bias(self) -> Tensor:
        """mean(q - g) / mean |g|: the asymmetric integer range pulls it below zero (2510.25602)."""
        return self.drift / self.magnitude

    @property
    def magnitude_bias(self) -> Tensor:
        """1 - 1/S with S = <g, g> / <g, q> (Quartet, 2505.14669): positive where q shrinks g.

        One draw; of a random quantizer average it over draws.
        """
        return 1 - self.gq / self.gg

    @property
    def noise_to_gradient(self) -> Tensor:
        """std(q - g) over the root mean square of g; training stalls above STALL_RATIO."""
        return ((self.noise - self.drift.square() / self.count).clamp(min=0) / self.gg).sqrt()


STATISTICS = (
    *("cosine", "relative_l2", "norm_ratio"),
    *("signed_bias", "magnitude_bias", "noise_to_gradient"),
)


def gradient_error(g: Tensor, q: Tensor) -> GradientError:
    """Compare two gradients of one shape.

    >>> import torch
    >>> found = gradient_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0]))
    >>> float(found.relative_l2), round(float(found.signed_bias), 4)
    (0.2, -0.1429)
    """
    if g.shape != q.shape:
        raise ValueError(f"shapes differ: {tuple(g.shape)} and {tuple(q.shape)}")
    g, q = g.detach().double().flatten(), q.detach().double().flatten()
    difference = q - g
    noise = difference.dot(difference)
    return GradientError(
        *(g.dot(g), g.dot(q), q.dot(q)), noise, difference.sum(), g.abs().sum(), g.numel()
    )
