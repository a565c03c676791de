"""How well a quantized tensor stands for the original: pure functions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit import kernels
from lowbit.definition.blocks import to_blocks
from lowbit.definition.noise import Key
from lowbit.definition.steps import scaled_blocks
from lowbit.formats import BlockFormat, IntFormat
from lowbit.measure.unbiasedness import GradientErrors as GradientErrors
from lowbit.measure.unbiasedness import gradient_errors as gradient_errors
from lowbit.quantize import checked, fake_quantize, unclamped_codes


def qsnr_db(x: Tensor, quantized: Tensor) -> Tensor:
    """Quantization signal-to-noise ratio -10 log10(|x - q|² / |x|²) in dB, over all elements."""
    x = x.double()
    noise = (x - quantized.double()).square().sum()
    return -10 * torch.log10(noise / x.square().sum())


@dataclass(frozen=True)
class QuantizationError:
    """Sums over the elements of a tensor; those of its parts (micro-batches, ranks) add up."""

    signal: float = 0.0  #: of x²
    noise: float = 0.0  #: of (x - q)²
    nonzero: int = 0  #: elements of x that are not zero
    kept: int = 0  #: elements of q that are not zero
    count: int = 0  #: elements

    def __add__(self, other: "QuantizationError") -> "QuantizationError":
        mine, theirs = vars(self), vars(other)
        return QuantizationError(*(mine[name] + theirs[name] for name in mine))

    @property
    def qsnr_db(self) -> float:
        """`qsnr_db`; NaN for zeros, infinite without noise."""
        if self.signal == 0 or math.isnan(self.noise):
            return math.nan
        return -10 * math.log10(self.noise / self.signal) if self.noise else math.inf

    @property
    def underflow_share(self) -> float:
        """`underflow_share`: no zero of x becomes another value."""
        return (self.nonzero - self.kept) / self.count if self.count else math.nan


def quantization_error(
    x: Tensor, format: BlockFormat, dim: int = -1, *, key: Key | None = None
) -> QuantizationError:
    """What `fake_quantize` of `x` in FP32 does to it, in one read of it on a CPU.

    >>> from lowbit.formats import block_format
    >>> error = quantization_error(torch.tensor([127.0, 0.25]), block_format("mxint8"))
    >>> error.noise, error.nonzero, error.kept
    (0.0625, 2, 1)
    """
    return quantization_errors(x, [(format, key)], dim)[0]


def quantization_errors(
    x: Tensor, wanted: Sequence[tuple[BlockFormat, Key | None]], dim: int = -1
) -> list[QuantizationError]:
    """`quantization_error` of each format and key, in one read for those of a block size."""
    wanted = [(checked(x, format, key), key) for format, key in wanted]
    done = kernels.quantization_sums(x, wanted, dim)
    if done is not None:
        return [QuantizationError(*sums, count=x.numel()) for sums in done]
    return [_defined_error(x.detach().float(), format, dim, key) for format, key in wanted]


def _defined_error(x: Tensor, format: BlockFormat, dim: int, key: Key | None) -> QuantizationError:
    q = fake_quantize(x, format, dim, key=key)
    signal, noise = (float(values.double().square().sum()) for values in (x, x - q))
    nonzero, kept = (int(values.count_nonzero()) for values in (x, q))
    return QuantizationError(signal, noise, nonzero, kept, x.numel())


def crest_factor(x: Tensor, block_size: int = 32, dim: int = -1) -> Tensor:
    """max |x| / RMS of each block along `dim` (zero fill counted in), float64; NaN for zeros."""
    if (done := kernels.crest_factors(x, block_size, dim)) is not None:
        return done
    blocks, inside = to_blocks(x.double(), block_size, dim)
    return blocks.abs().amax(inside) / blocks.square().mean(inside).sqrt()


@dataclass(frozen=True)
class ClampCounts:
    """How many codes there are, how many the element's range clamped, how many were at or below
    -2^(bits-1) before: the code that the symmetric integer range excludes.
    """

    total: int = 0
    clamped: int | Tensor = 0
    minus_128: int | Tensor = 0

    def __add__(self, other: "ClampCounts") -> "ClampCounts":
        return ClampCounts(
            self.total + other.total,
            self.clamped + other.clamped,
            self.minus_128 + other.minus_128,
        )


def clamp_counts(
    x: Tensor, format: BlockFormat, dim: int = -1, *, key: Key | None = None
) -> ClampCounts:
    """What the quantizer's clamp does to `x`; counts stay on its device.

    >>> from lowbit.formats import ScaleRule, block_format
    >>> floor = block_format("mxint8", scale_rule=ScaleRule.FLOOR)
    >>> counts = clamp_counts(torch.tensor([-127.75, 1.0]), floor)
    >>> counts.total, int(counts.clamped), int(counts.minus_128)
    (2, 1, 1)
    """
    if x.numel() == 0:
        return ClampCounts()
    codes = unclamped_codes(x, format, dim, key=key)
    element = format.element
    clamped = ((codes > element.max) | (codes < element.min)).sum()
    if isinstance(element, IntFormat):
        return ClampCounts(x.numel(), clamped, (codes < -element.max).sum())
    return ClampCounts(x.numel(), clamped)


def quantiles(values: Tensor, at: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)) -> Tensor:
    """Quantiles of all values but NaN, interpolated linearly (numpy's default), float64.

    Unlike `torch.quantile` for any number of values.

    >>> quantiles(torch.tensor([3.0, 1.0, 2.0, torch.nan])).tolist()
    [1.0, 1.5, 2.0, 2.5, 3.0]
    """
    ordered = values[~values.isnan()].double().sort().values
    if not len(ordered):
        return torch.full((len(at),), torch.nan, dtype=torch.float64)
    place = torch.tensor(at, dtype=torch.float64, device=values.device) * (len(ordered) - 1)
    below = place.floor().long()
    above = (below + 1).clamp(max=len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], place - below)


def mean_relative_error(x: Tensor, quantized: Tensor) -> Tensor:
    """Mean of |x - q| / |x| over the elements with x != 0, a fraction (the study's MRE)."""
    x, quantized = x.double(), quantized.double()
    nonzero = x != 0
    errors = torch.where(nonzero, (x - quantized).abs() / x.abs(), 0.0)
    return errors.sum() / nonzero.sum()


def underflow_share(x: Tensor, quantized: Tensor) -> Tensor:
    """Fraction of all elements that were not zero and became zero (TE's `underflows%` / 100)."""
    return ((quantized == 0) & (x != 0)).double().mean()


@dataclass(frozen=True)
class CodeCounts:
    """How often each value of an element format occurs as a code."""

    values: Tensor  #: ascending; -0 counts as 0
    counts: Tensor  #: int64; elements of blocks with NaN or Inf are in none
    clamped: Tensor  #: codes beyond the element's range before it saturated them
    minus_128: Tensor  #: of integers: codes at or below -2^(bits-1) before that; else 0

    @property
    def saturated_share(self) -> Tensor:
        """Fraction of the codes that the range clamped; 0 where the scale rounds up."""
        return self.clamped / self.counts.sum()

    @property
    def endpoint_shares(self) -> tuple[Tensor, Tensor]:
        """Fractions at the least and at the largest value."""
        total = self.counts.sum()
        return self.counts[0] / total, self.counts[-1] / total

    @property
    def last_bucket_share(self) -> Tensor:
        """Fraction of the codes of the largest magnitude: what is near a block's maximum.

        Near 1 a block holds a single magnitude, as clustered norm gains do (2506.20752).
        """
        magnitude = self.values.abs()
        return self.counts[magnitude >= self.values[-1]].sum() / self.counts.sum()

    @property
    def entropy_bits(self) -> Tensor:
        """Shannon entropy of the codes, in bits per element."""
        share = self.counts.double() / self.counts.sum()
        return -torch.xlogy(share, share).sum() / math.log(2)


def code_counts(
    x: Tensor, format: BlockFormat, dim: int = -1, *, key: Key | None = None
) -> CodeCounts:
    """The histogram of the codes of `x`, and what the range did to them.

    >>> from lowbit.formats import block_format
    >>> code_counts(torch.tensor([7.0, 6.6, 0.2, -1.0]), block_format("mxint4")).counts.tolist()
    [0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 2]
    """
    element = format.element
    values = torch.tensor(sorted({v + 0.0 for v in element.values}), device=x.device)
    codes = unclamped_codes(x, format, dim, key=key).float()
    codes = codes[~codes.isnan()]
    clamped = ((codes > element.max) | (codes < element.min)).sum()
    integer = isinstance(element, IntFormat)
    below = (codes <= -(2.0 ** (element.bits - 1))).sum() if integer else torch.zeros_like(clamped)
    places = torch.searchsorted(values, codes.clamp(element.min, element.max))
    return CodeCounts(values, torch.bincount(places, minlength=len(values)), clamped, below)


def scale_exponents(x: Tensor, format: BlockFormat, dim: int = -1) -> dict[int, int]:
    """How many blocks have which floor(log2 scale), the tensor scale counted in; none if it is NaN.

    For E8M0 that is the stored exponent: -127 and 127 are its rails.

    >>> from lowbit.formats import block_format
    >>> scale_exponents(torch.tensor([[127.0], [128.0]]), block_format("mxint8"))
    {0: 1, 1: 1}
    """
    scaled = scaled_blocks(x, format, dim)
    scale = scaled.product.double()
    exponents = torch.frexp(scale[scale.isfinite()]).exponent - 1
    if not len(exponents):
        return {}
    least = int(exponents.min())
    counts = torch.bincount(exponents - least).tolist()
    return {least + i: count for i, count in enumerate(counts) if count}
