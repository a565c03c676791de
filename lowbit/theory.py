"""QSNR of a format as a function of the crest factor of its blocks: the INT-v-FP study's Theorems 1
and 2 (arXiv 2510.25602), for Gaussian values, and where an integer and a float format cross.

    INT   -10 log10[(rho k)² / (12 Q²)]                      k: crest factor, max / RMS of a block
    FP    -10 log10[alpha w + beta (rho k)² p]               rho: scale over the ideal amax / max
    alpha = 2^(-2M) / 24, beta = smallest² / (12 max²)       Q: largest integer code

w is the share of the energy in normal values, p the share of the values among the subnormals.
Where scales are not powers of two a block's maximum is free of error: INT gains the factor
(g-1)/g, FP's w loses k²/g, g being the block size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lowbit.formats import BlockFormat, FloatFormat, IntFormat, ScaleFormat


@dataclass(frozen=True)
class Convention:
    """What the formulas leave open."""

    name: str
    rho_e8m0: float  #: the rceil rule gives 1 <= rho < 2
    rho_e4m3: float
    whole_q: bool  #: Q = 2^(bits-1) instead of the largest code 2^(bits-1) - 1
    rounded: bool  #: the printed 4.78 + 6.02 bits instead of 10 log10(12 Q²)

    def rho(self, format: BlockFormat) -> float:
        """BF16 and FP32 scales are ideal."""
        scales = {ScaleFormat.E8M0: self.rho_e8m0, ScaleFormat.E4M3: self.rho_e4m3}
        return scales.get(format.scale, 1.0)


STUDY = Convention("study", rho_e8m0=1.5, rho_e4m3=1.05, whole_q=True, rounded=True)
"""Its released script; the text has rho = 1 for E4M3 scales."""
EXACT = Convention("exact", rho_e8m0=1.5, rho_e4m3=1.05, whole_q=False, rounded=False)


@dataclass(frozen=True)
class Crossover:
    """The integer format has the higher QSNR below this crest factor, the float format above."""

    integer: str
    floating: str
    crest: float
    qsnr_db: float


def qsnr_theory_db(format: BlockFormat, crest: float, convention: Convention = EXACT) -> float:
    """Predicted QSNR in dB of Gaussian blocks with this crest factor (their max over their RMS).

    >>> from lowbit.formats import MXFP8, MXINT8
    >>> [round(qsnr_theory_db(f, 2.368), 1) for f in (MXINT8, MXFP8)]
    [41.9, 31.9]
    """
    if crest < 1:
        raise ValueError(f"crest={crest}: a maximum is never below the RMS, so at least 1")
    match format.element:
        case IntFormat():
            return _integer_db(format, format.element, crest, convention)
        case FloatFormat():
            return _float_db(format, format.element, crest, convention)


def crossover(
    integer: BlockFormat, floating: BlockFormat, convention: Convention = EXACT
) -> Crossover:
    """Where the curves of two formats cross; ValueError where they do not."""
    low, high = 1.0, 64.0

    def lead(crest: float) -> float:
        ours = qsnr_theory_db(integer, crest, convention)
        return ours - qsnr_theory_db(floating, crest, convention)

    # E4M3 scales leave no float error at all where k² reaches g w: look below that
    if floating.scale != ScaleFormat.E8M0 and isinstance(floating.block_size, int):
        high = 0.9 * math.sqrt(floating.block_size) if floating.block_size > 0 else high
    if not lead(low) > 0 > lead(high):
        raise ValueError(f"{integer} and {floating} do not cross between crest {low} and {high}")
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if lead(middle) > 0 else (low, middle)
    return Crossover(str(integer), str(floating), low, qsnr_theory_db(floating, low, convention))


def curve(
    format: BlockFormat, crests: Sequence[float], convention: Convention = EXACT
) -> list[float]:
    """`qsnr_theory_db` at each crest factor; NaN where a formula that counts the maximum in ends:
    no block of g values has a crest factor above sqrt(g).
    """
    return [
        math.nan
        if _exact_maximum(format, crest)[1] >= 1
        else qsnr_theory_db(format, crest, convention)
        for crest in crests
    ]


def _exact_maximum(format: BlockFormat, crest: float) -> tuple[float, float]:
    """(error left of 1 for integers, energy share of the maximum): the block's maximum is exact."""
    size = format.block_size if isinstance(format.block_size, int) else math.prod(format.block_size)
    if format.scale == ScaleFormat.E8M0 or size < 2:
        return 1.0, 0.0
    return (size - 1) / size, crest**2 / size


def _integer_db(
    format: BlockFormat, element: IntFormat, crest: float, convention: Convention
) -> float:
    error, _ = _exact_maximum(format, crest)
    level = 10 * math.log10(12 * (element.max + convention.whole_q) ** 2)
    if convention.rounded:
        level = 4.78 + 6.02 * element.bits
    return level - 20 * math.log10(convention.rho(format) * crest) - 10 * math.log10(error)


def _float_db(
    format: BlockFormat, element: FloatFormat, crest: float, convention: Convention
) -> float:
    reach = convention.rho(format) * crest  # the scale times `max`, in units of the RMS
    smallest_normal = reach / element.max * 2.0**element.min_exponent
    subnormal = math.erf(smallest_normal / math.sqrt(2))
    density = math.exp(-(smallest_normal**2) / 2) * math.sqrt(2 / math.pi)
    normal_energy = 1 - (subnormal - smallest_normal * density)
    alpha = 2.0 ** (-2 * element.mantissa_bits) / 24
    beta = element.smallest**2 / (12 * element.max**2)
    _, of_maximum = _exact_maximum(format, crest)
    noise = alpha * max(normal_energy - of_maximum, 0.0) + beta * reach**2 * subnormal
    return -10 * math.log10(noise)
