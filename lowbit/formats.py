"""What a block format is, elements that share a scale, and every named one as a literal."""

import math
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any


class ScaleFormat(Enum):
    """How a block's scale is stored."""

    E8M0 = "e8m0"  #: a power of two, 2^-127 .. 2^127 (OCP MX)
    E4M3 = "e4m3"  #: FP8, under one FP32 scale for the whole tensor (NV formats)
    BF16 = "bf16"
    FP32 = "fp32"

    @property
    def bits(self) -> int:
        """Of one code."""
        return {"bf16": 16, "fp32": 32}.get(self.value, 8)

    @property
    def significant_bits(self) -> int:
        """Of the mantissa with its leading one; none for a power of two, which only shifts."""
        return {"e8m0": 0, "e4m3": 4, "bf16": 8, "fp32": 24}[self.value]


class ScaleRule(Enum):
    """Which power of two an E8M0 scale takes, for a block maximum `amax`; torchao's names."""

    RCEIL = "rceil"  #: ceil(log2(amax / max)): nothing clips (INT-v-FP study, NVIDIA 2506.08027)
    FLOOR = "floor"  #: floor(log2 amax) - emax (OCP MX v1.0 section 6.3, microxcaling): may clip
    CEIL = "ceil"  #: ceil(log2 amax) - emax: nothing clips
    EVEN = "even"  #: floor, after rounding amax to the element's mantissa width


class Rounding(Enum):
    """How a scaled value becomes an element."""

    NEAREST = "nearest"  #: to the nearest, ties to even
    HALF_AWAY = "half_away"  #: to the nearest, ties away from zero (microxcaling's default)
    STOCHASTIC = "stochastic"  #: up with the probability of the remainder: unbiased


class Arithmetic(Enum):
    """The precision in which scale and quotient are computed."""

    FP32 = "fp32"  #: with exact exponents
    BF16 = "bf16"  #: rounded to BF16 after every operation, log2 included, as the study's code does


@dataclass(frozen=True)
class IntFormat:
    """Integers of `bits` bits; codes -(2^(bits-1)-1) .. 2^(bits-1)-1.

    >>> IntFormat(8).min, IntFormat(8, symmetric=False).min
    (-127, -128)
    """

    bits: int
    symmetric: bool = True  #: False admits -2^(bits-1): for ablations

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"IntFormat bits={self.bits} is not in 2..8")

    @property
    def max(self) -> int:
        """The largest value."""
        return int(2 ** (self.bits - 1) - 1)

    @property
    def min(self) -> int:
        """The smallest value."""
        return -self.max - (not self.symmetric)

    @property
    def mantissa_bits(self) -> int:
        """Bits below the leading one of the largest code: 6 of INT8's 1.111111."""
        return self.bits - 2

    @property
    def smallest(self) -> int:
        """The least positive value."""
        return 1

    @property
    def values(self) -> tuple[float, ...]:
        """All values, ascending."""
        return tuple(float(code) for code in range(self.min, self.max + 1))


@dataclass(frozen=True)
class FloatFormat:
    """Small floats with subnormals: sign, `exponent_bits`, `mantissa_bits`; no infinities are used.

    >>> FloatFormat(2, 1, max=6.0).values[8:]
    (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    """

    exponent_bits: int
    mantissa_bits: int
    max: float  #: given, not derived: E4M3 spends all but one code of its top binade on numbers

    def __post_init__(self) -> None:
        if self.values[-1] != self.max:
            raise ValueError(f"max={self.max} is not a value of {self.bits}-bit floats like this")

    @property
    def bits(self) -> int:
        """Of one code."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def min(self) -> float:
        """The smallest value."""
        return -self.max

    @property
    def bias(self) -> int:
        """Of the exponent field."""
        return int(2 ** (self.exponent_bits - 1) - 1)

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal value, and of all subnormals."""
        return 1 - self.bias

    @property
    def smallest(self) -> float:
        """The least positive (subnormal) value."""
        return float(2.0 ** (self.min_exponent - self.mantissa_bits))

    @property
    def has_nan(self) -> bool:
        """Whether a code means NaN; OCP's 6- and 4-bit floats have none."""
        return self.bits == 8

    def decode(self, code: int) -> float:
        """The value of the bits sign, exponent, mantissa; past `max` NaN or E5M2's infinity."""
        exponent, mantissa = divmod(code % 2 ** (self.bits - 1), 2**self.mantissa_bits)
        units = mantissa + (2**self.mantissa_bits if exponent else 0)
        value = math.ldexp(units * self.smallest, max(exponent - 1, 0))
        if value > self.max:
            value = math.nan if mantissa else math.inf
        return -value if code >> self.bits - 1 else value

    @property
    def values(self) -> tuple[float, ...]:
        """All finite values, -0.0 and the negative ones (by magnitude) first, then 0.0 and up."""
        half = 2 ** (self.bits - 1)
        codes = [*range(half, 2 * half), *range(half)]
        return tuple(value for value in map(self.decode, codes) if math.isfinite(value))


@dataclass(frozen=True)
class BlockFormat:
    """An element format and how blocks of it are scaled. Change one with `dataclasses.replace`.

    Raises ValueError for a setting that would have no effect or no meaning.

    >>> from dataclasses import replace
    >>> print(replace(MXINT8, scale_rule=ScaleRule.FLOOR))
    mxint8(scale_rule=floor)
    """

    name: str  #: of the named format it started from
    element: IntFormat | FloatFormat
    scale: ScaleFormat = ScaleFormat.E8M0
    block_size: int | tuple[int, int] = 32  #: values, -1 for the whole axis; (rows, columns) in 2-D
    scale_rule: ScaleRule | None = ScaleRule.RCEIL  #: for E8M0 scales, and for them alone
    rounding: Rounding = Rounding.NEAREST
    arithmetic: Arithmetic = Arithmetic.FP32
    scale_min: float | None = None  #: E4M3 scales stay at or above it; None is 2^-9, torchao's 2^-6

    def __post_init__(self) -> None:
        sizes = self.block_size if isinstance(self.block_size, tuple) else (self.block_size,)
        if min(sizes) < 1 and self.block_size != -1:
            raise ValueError(f"block_size={self.block_size}: positive, or -1 for the whole axis")
        if (self.scale is ScaleFormat.E8M0) != (self.scale_rule is not None):
            wrong = f"{self.scale_rule} with {self.scale}"
            raise ValueError(f"{wrong}: e8m0 scales need a rule, others have none")
        least = E4M3.values[128:] if self.scale is ScaleFormat.E4M3 else ()
        if self.scale_min not in (None, *least):
            raise ValueError(f"scale_min={self.scale_min}: for e4m3 scales, a positive e4m3 value")
        exact = self.scale is ScaleFormat.FP32 or self.scale_rule is ScaleRule.EVEN
        if self.arithmetic is Arithmetic.BF16 and exact:
            raise ValueError("arithmetic=bf16 is not defined for FP32 scales, nor scale_rule=even")

    @property
    def bits_per_value(self) -> float:
        """Stored bits per value, the block's scale included (a tensor or row scale is not)."""
        sizes = self.block_size if isinstance(self.block_size, tuple) else (self.block_size,)
        return self.element.bits + max(0.0, self.scale.bits / math.prod(sizes))  # -1: no bits

    @property
    def fits_bf16(self) -> bool:
        """Whether code x block scale always has at most 8 significant bits: exact in BF16."""
        return self.element.mantissa_bits + 1 + self.scale.significant_bits <= 8

    @property
    def clips(self) -> bool:
        """Whether a finite value can exceed the element's range: not where the scale rounds up."""
        rounds_up = self.scale_rule in (ScaleRule.RCEIL, ScaleRule.CEIL) and self.element.max >= 2
        return not (rounds_up and self.arithmetic is Arithmetic.FP32)

    def changes(self) -> dict[str, Any]:
        """The fields in which this differs from the named format."""
        named = NAMED.get(self.name, BlockFormat(self.name, self.element))
        return {name: value for name, value in vars(self).items() if value != getattr(named, name)}

    def __str__(self) -> str:
        shown = ", ".join(f"{k}={getattr(v, 'value', v)}" for k, v in self.changes().items())
        return f"{self.name}({shown})" if shown else self.name


E4M3 = FloatFormat(4, 3, max=448.0)
E5M2 = FloatFormat(5, 2, max=57344.0)
E2M3 = FloatFormat(2, 3, max=7.5)
E3M2 = FloatFormat(3, 2, max=28.0)
E2M1 = FloatFormat(2, 1, max=6.0)

MXINT8 = BlockFormat("mxint8", IntFormat(8))
MXINT6 = BlockFormat("mxint6", IntFormat(6))
MXINT4 = BlockFormat("mxint4", IntFormat(4))
MXFP8 = BlockFormat("mxfp8", E4M3)
MXFP8_E5M2 = BlockFormat("mxfp8_e5m2", E5M2)
MXFP6 = BlockFormat("mxfp6", E2M3)
MXFP6_E3M2 = BlockFormat("mxfp6_e3m2", E3M2)
MXFP4 = BlockFormat("mxfp4", E2M1)
NVINT8 = BlockFormat("nvint8", IntFormat(8), ScaleFormat.E4M3, 16, scale_rule=None)
NVINT4 = BlockFormat("nvint4", IntFormat(4), ScaleFormat.E4M3, 16, scale_rule=None)
NVFP4 = BlockFormat("nvfp4", E2M1, ScaleFormat.E4M3, 16, scale_rule=None)
INT8 = BlockFormat("int8", IntFormat(8), ScaleFormat.FP32, -1, scale_rule=None)

_MX = (MXINT8, MXINT6, MXINT4, MXFP8, MXFP8_E5M2, MXFP6, MXFP6_E3M2, MXFP4)
NAMED = {format.name: format for format in (*_MX, NVINT8, NVINT4, NVFP4, INT8)}
ALIASES = {"mxfp8_e4m3": MXFP8, "mxfp6_e2m3": MXFP6}


def block_format(name: str, **changes: Any) -> BlockFormat:
    """The format called `name`, with fields changed; ValueError lists the names.

    >>> block_format("mxint8", block_size=64).bits_per_value
    8.125
    """
    known = NAMED | ALIASES
    if name not in known:
        raise ValueError(f"unknown block format {name!r}, expected one of {sorted(known)}")
    return replace(known[name], **changes)
