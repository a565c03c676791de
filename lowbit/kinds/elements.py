"""What one number is: the formats of elements and of scales, frozen values that all else reads."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

FLOAT32_MAX = (2 - 2.0**-23) * 2.0**127
_E8 = {0: ("e8m0", 2.0**127), 7: ("bf16", (2 - 2.0**-7) * 2.0**127), 23: ("fp32", FLOAT32_MAX)}


def whole(value: Any, low: int, high: int, what: str) -> int:
    """The number itself; ValueError where it is none of low .. high."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{what}={value!r} is not in {low}..{high}")
    return value


@dataclass(frozen=True)
class IntFormat:
    """Integers of `bits` bits; codes -(2^(bits-1)-1) .. 2^(bits-1)-1.

    >>> IntFormat(8).min, IntFormat(8, symmetric=False).min
    (-127, -128)
    """

    bits: int
    symmetric: bool = True  #: False admits -2^(bits-1): for ablations

    def __post_init__(self) -> None:
        whole(self.bits, 2, 8, "IntFormat bits")

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

    @property
    def label(self) -> str:
        """What `element_of` reads."""
        return f"int{self.bits}" if self.symmetric else repr(self)


@dataclass(frozen=True)
class Minifloat:
    """Small floats with subnormals; their magnitudes are the codes of exponent and mantissa."""

    exponent_bits: int
    mantissa_bits: int
    max: float = 0.0
    """Given, not derived: E4M3 spends all but one code of its top binade on numbers, E5M2 none.
    Left out, it is OCP's, else the value of the largest code that does not mean NaN."""

    _keeps_nan: ClassVar[bool] = False  # a code for NaN, whatever the width

    def __post_init__(self) -> None:
        what, bits = type(self).__name__, self.exponent_bits
        whole(bits, 1, 7, f"{what} exponent_bits")
        whole(self.mantissa_bits, 0, 7 + self._keeps_nan - bits, f"{what} mantissa_bits")
        if self.max == 0:
            largest = self._magnitude(self._codes - 2 if self._wants_nan else self._codes - 1)
            largest = 57344.0 if (what, bits, self.mantissa_bits) == _E5M2 else largest
            object.__setattr__(self, "max", largest)
        known = [self._magnitude(code) for code in range(1, self._codes - self._keeps_nan)]
        if self.max not in known or self.max < 1:
            most, floats = max(known, default=0), f"e{bits}m{self.mantissa_bits}"
            raise ValueError(f"max={self.max} is not a value of {floats} from 1 to {most:g}")

    @property
    def _codes(self) -> int:
        return int(2 ** (self.exponent_bits + self.mantissa_bits))

    @property
    def _wants_nan(self) -> bool:
        return self._keeps_nan or self._codes == 128  # OCP's 6- and 4-bit floats have none

    def _magnitude(self, code: int) -> float:
        exponent, mantissa = divmod(code, 2**self.mantissa_bits)
        units = mantissa + (2**self.mantissa_bits if exponent else 0)
        return math.ldexp(units * self.smallest, max(exponent - 1, 0))

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
        """Whether the last code means NaN; OCP's 6- and 4-bit floats have none."""
        return self._wants_nan and self._magnitude(self._codes - 1) > self.max

    def decode(self, code: int) -> float:
        """The value of the bits sign, exponent, mantissa; past `max` NaN or E5M2's infinity."""
        sign, magnitude = divmod(code, self._codes)
        value = self._magnitude(magnitude)
        if value > self.max:
            infinite = magnitude % 2**self.mantissa_bits == 0 and not self._keeps_nan
            value = math.inf if infinite else math.nan
        return -value if sign else value

    def _labelled(self, kind: str) -> str:
        left_out = type(self)(self.exponent_bits, self.mantissa_bits).max
        limit = "" if self.max == left_out else f"max{self.max:.17g}"
        return f"{kind}{self.exponent_bits}m{self.mantissa_bits}{limit}"


_E5M2 = ("FloatFormat", 5, 2)  # OCP gives its top binade to infinities and NaN


@dataclass(frozen=True)
class FloatFormat(Minifloat):
    """Small floats with a sign, at most 8 bits; no infinities are used.

    >>> FloatFormat(2, 1, max=6.0).values[8:]
    (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    """

    @property
    def bits(self) -> int:
        """Of one code."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def min(self) -> float:
        """The smallest value."""
        return -self.max

    @property
    def values(self) -> tuple[float, ...]:
        """All finite values, -0.0 and the negative ones (by magnitude) first, then 0.0 and up."""
        codes = [*range(self._codes, 2 * self._codes), *range(self._codes)]
        return tuple(value for value in map(self.decode, codes) if math.isfinite(value))

    @property
    def label(self) -> str:
        """What `element_of` reads."""
        return self._labelled("e")


@dataclass(frozen=True)
class ScaleFormat(Minifloat):
    """How a block's scale is stored: an unsigned float of at most 8 bits whose last code means NaN,
    or one with FP32's eight bits of exponent: a power of two, BF16, FP32.

    >>> ScaleFormat(5, 3).value, ScaleFormat(5, 3).max, ScaleFormat(4, 3) == ScaleFormat.E4M3
    ('ue5m3', 114688.0, True)
    """

    _keeps_nan: ClassVar[bool] = True
    E8M0: ClassVar["ScaleFormat"]  #: a power of two, 2^-127 .. 2^127 (OCP MX)
    E4M3: ClassVar["ScaleFormat"]  #: FP8 (NV formats)
    BF16: ClassVar["ScaleFormat"]
    FP32: ClassVar["ScaleFormat"]

    def __post_init__(self) -> None:
        if self.exponent_bits != 8 or self.mantissa_bits not in _E8:
            super().__post_init__()
        elif self.max not in (0, _E8[self.mantissa_bits][1]):
            raise ValueError(
                f"max={self.max}: that of {self.value} is {_E8[self.mantissa_bits][1]}"
            )
        else:
            object.__setattr__(self, "max", _E8[self.mantissa_bits][1])

    @property
    def value(self) -> str:
        """Its name, which `scale_of` reads."""
        if self.exponent_bits == 8:
            return _E8[self.mantissa_bits][0]
        return "e4m3" if vars(self) == vars(ScaleFormat.E4M3) else self._labelled("ue")

    def holds(self, value: Any) -> bool:
        """Whether a code means this positive number."""
        return (
            value in [self._magnitude(code) for code in range(1, self._codes)] and value <= self.max
        )

    @property
    def is_minifloat(self) -> bool:
        """Whether its range is short: others reach as far as FP32."""
        return self.exponent_bits < 8

    @property
    def smallest(self) -> float:
        """The least positive value."""
        # not by super(), for which Dynamo finds the property itself
        lowest = -127 if self == ScaleFormat.E8M0 else self.min_exponent - self.mantissa_bits
        return float(2.0**lowest)

    @property
    def bits(self) -> int:
        """Of one code; E4M3, BF16 and FP32 are stored with a sign that is never set."""
        signed = self in (ScaleFormat.E4M3, ScaleFormat.BF16, ScaleFormat.FP32)
        return self.exponent_bits + self.mantissa_bits + signed

    @property
    def significant_bits(self) -> int:
        """Of the mantissa with its leading one; none for a power of two, which only shifts."""
        return self.mantissa_bits + 1 if self.mantissa_bits else 0

    def __str__(self) -> str:
        return f"ScaleFormat.{self.value.upper()}"


ScaleFormat.E8M0 = ScaleFormat(8, 0)
ScaleFormat.E4M3 = ScaleFormat(4, 3)
ScaleFormat.BF16 = ScaleFormat(8, 7)
ScaleFormat.FP32 = ScaleFormat(8, 23)
SCALES = {
    scale.value: scale
    for scale in (ScaleFormat.E8M0, ScaleFormat.E4M3, ScaleFormat.BF16, ScaleFormat.FP32)
}
