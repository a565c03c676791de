"""What a block format is, elements that share a scale, and every named one as a literal."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from lowbit.kinds import notation
from lowbit.kinds.elements import FloatFormat as FloatFormat
from lowbit.kinds.elements import IntFormat as IntFormat
from lowbit.kinds.elements import ScaleFormat as ScaleFormat
from lowbit.kinds.rules import AnyRule, rules_of
from lowbit.kinds.rules import Arithmetic as Arithmetic
from lowbit.kinds.rules import OuterScale as OuterScale
from lowbit.kinds.rules import Rounding as Rounding
from lowbit.kinds.rules import ScaleRounding as ScaleRounding
from lowbit.kinds.rules import ScaleRule as ScaleRule


@dataclass(frozen=True)
class BlockFormat:
    """An element format and how blocks of it are scaled. Change one with `dataclasses.replace`.

    Raises ValueError for a setting that would have no effect or no meaning.

    >>> from dataclasses import replace
    >>> print(replace(MXINT8, scale_rule=ScaleRule.FLOOR))
    mxint8(scale_rule=floor)
    """

    name: str  #: of the named format it started from, or its own
    element: IntFormat | FloatFormat
    scale: ScaleFormat = ScaleFormat.E8M0
    block_size: int | tuple[int, int] = 32  #: values, -1 for the whole axis; (rows, columns) in 2-D
    scale_rule: AnyRule | None = ScaleRule.RCEIL  #: None is NEAREST, for all but E8M0 scales
    rounding: Rounding = Rounding.NEAREST
    arithmetic: Arithmetic = Arithmetic.FP32
    scale_min: float | None = None
    """Minifloat scales stay at or above it; None is their least, 2^-9 of E4M3, torchao has 2^-6."""
    outer_scale: OuterScale | None = None  #: above minifloats; None is TENSOR there, NONE elsewhere

    def __post_init__(self) -> None:
        sizes = self.block_size if isinstance(self.block_size, tuple) else (self.block_size,)
        if not all(type(size) is int and size > 0 for size in sizes) and self.block_size != -1:
            raise ValueError(f"block_size={self.block_size}: positive, or -1 for the whole axis")
        self._check_scale()
        linear = self.scale == ScaleFormat.FP32 or self.scale_rule not in _BF16_RULES
        if self.arithmetic is Arithmetic.BF16 and linear:
            raise ValueError("arithmetic=bf16 is not defined for FP32 scales, even, up nor best")
        own = (E2M1, ScaleFormat.E4M3, None, Rounding.NEAREST, None, OuterScale.TENSOR)
        has = (self.element, self.scale, self.scale_rule, self.rounding, self.scale_min, self.outer)
        if self.arithmetic.is_owners and has != own:
            raise ValueError(f"arithmetic={self.arithmetic.value} is that of nvfp4, in any blocks")

    def _check_scale(self) -> None:
        allowed, rule = rules_of(self.scale, self.element), self.scale_rule or ScaleRounding.NEAREST
        if rule not in allowed:
            own = f"scale={self.scale.value} has {', '.join(rule.value for rule in allowed)}"
            why = "e8m0 scales need a rule, others have none of theirs"
            raise ValueError(f"scale_rule={getattr(self.scale_rule, 'value', None)}: {own}; {why}")
        if rule is ScaleRounding.NEAREST:
            object.__setattr__(self, "scale_rule", None)
        if self.outer_scale is self._own_outer_scale:
            object.__setattr__(self, "outer_scale", None)
        if self.outer_scale is OuterScale.ROW and isinstance(self.block_size, tuple):
            raise ValueError("outer_scale=row: 2-D blocks have none")
        if self.outer_scale and not self.scale.is_minifloat:
            raise ValueError(f"outer_scale={self.outer_scale.value}: {self.scale.value} has none")
        least = self.scale_min
        if least is not None and not (self.scale.is_minifloat and self.scale.holds(least)):
            raise ValueError(f"scale_min={least}: for e4m3 scales and the like, one of theirs")
        if self.scale.is_minifloat and self.element.max * self.scale.max >= 2.0**127:
            raise ValueError(f"{self.element} times {self.scale} is beyond FP32's range")

    @property
    def _own_outer_scale(self) -> OuterScale:
        return OuterScale.TENSOR if self.scale.is_minifloat else OuterScale.NONE

    @property
    def outer(self) -> OuterScale:
        """What stands above the block scales."""
        return self.outer_scale or self._own_outer_scale

    @property
    def least_scale(self) -> float:
        """That a minifloat scale can be."""
        return self.scale.smallest if self.scale_min is None else self.scale_min

    @property
    def most_scale(self) -> float:
        """The minifloat scale of the block with the tensor's largest value, under a tensor scale:
        FOUR_OVER_SIX needs room for its 1.5-fold.
        """
        room = self.scale_rule is ScaleRounding.FOUR_OVER_SIX
        return 2.0 ** math.floor(math.log2(self.scale.max / 1.5)) if room else self.scale.max

    @property
    def bits_per_value(self) -> float:
        """Stored bits per value, the block's scale included (a tensor or row scale is not)."""
        sizes = self.block_size if isinstance(self.block_size, tuple) else (self.block_size,)
        return self.element.bits + max(0.0, self.scale.bits / math.prod(sizes))  # -1: no bits

    @property
    def fits_bf16(self) -> bool:
        """Whether code x block scale always has at most 8 significant bits: exact in BF16."""
        bits = self.element.mantissa_bits + 1 + self.scale.significant_bits
        return bits <= 8 and not self.arithmetic.is_owners

    @property
    def clips(self) -> bool:
        """Whether a finite value can exceed the element's range: not where the scale rounds up."""
        rounds_up = self.scale_rule in (ScaleRule.RCEIL, ScaleRule.CEIL) and self.element.max >= 2
        return not (rounds_up and self.arithmetic is Arithmetic.FP32)

    def changes(self) -> dict[str, Any]:
        """The fields in which this differs from what its name says."""
        base = named(self.name)
        if base is None:
            base = BlockFormat(self.name, notation.element_in(self.name) or _NONE_SAID)
        return {name: value for name, value in vars(self).items() if value != getattr(base, name)}

    def __str__(self) -> str:
        """Two formats that differ are never spelt alike."""
        shown = ", ".join(f"{name}={_shown(value)}" for name, value in self.changes().items())
        return f"{self.name}({shown})" if shown else self.name


def _shown(value: Any) -> str:
    own = isinstance(value, IntFormat | FloatFormat)
    return str(value.label if own else getattr(value, "value", value))


_NONE_SAID = IntFormat(2, symmetric=False)
_BF16_RULES = (None, ScaleRule.RCEIL, ScaleRule.FLOOR, ScaleRule.CEIL)

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


def named(name: str) -> BlockFormat | None:
    """The format that a name alone stands for: of the table, or spelt out (`mxint5`, `nve3m2`,
    `e2m1_ue5m3`, each with `_b16` for another block); None for other names.
    """
    if name in NAMED or name in ALIASES:
        return (NAMED | ALIASES)[name]
    if block := notation.block_in(name):
        return (stem := named(block[0])) and replace(stem, name=name, block_size=block[1])
    if spelt := notation.spelt_in(name):
        return BlockFormat(name, scale_rule=_default_rule(spelt["scale"]), **spelt)
    return None


def _default_rule(scale: ScaleFormat) -> AnyRule | None:
    return ScaleRule.RCEIL if scale == ScaleFormat.E8M0 else None


def block_format(name: str | Mapping[str, Any] | BlockFormat, **changes: Any) -> BlockFormat:
    """The format of this name, or of plain data with a `name` or an `element`, with fields changed;
    ValueError lists the names, or says what is wrong. `to_plain` is its inverse.

    >>> block_format("mxint8", block_size=64).bits_per_value
    8.125
    >>> print(block_format({"element": {"bits": 5}, "scale_rule": "floor"}))
    mxint5(scale_rule=floor)
    """
    match name:
        case BlockFormat():
            format = name
        case str():
            if (found := named(name)) is None:
                known = ", ".join(sorted(NAMED))
                raise ValueError(f"unknown block format {name!r} is none of {known}")
            format = found
        case _:
            format = _from_plain(name)
    return replace(format, **notation.parsed(changes))


def _from_plain(plain: Any) -> BlockFormat:
    known = (*(field.name for field in fields(BlockFormat)), "symmetric")
    if not isinstance(plain, Mapping) or not plain.keys() & {"name", "element"}:
        raise ValueError(f"{plain!r} is neither a format's name nor a mapping with `name`")
    if unknown := sorted(map(str, plain.keys() - {*known})):
        raise ValueError(
            f"a format has no {', '.join(unknown)}, expected some of {', '.join(known)}"
        )
    changes = notation.parsed(plain)
    element, scale = changes.get("element"), changes.get("scale", ScaleFormat.E8M0)
    name = notation.checked_name(changes.pop("name", None) or _name_of(element, scale))
    base = named(name)
    if base is None:
        base = _start(name, element, scale) if element else block_format(name)
    elif element is not None and element.label != base.element.label:
        raise ValueError(
            f"name: {name} is that of {base.element.label} elements: those of {element.label} need "
            "another, or none"
        )
    if "scale" in changes and scale != base.scale:
        changes.setdefault("scale_rule", _default_rule(scale))
    if "symmetric" in changes:
        changes["element"] = notation.asymmetric(base.element, changes.pop("symmetric"))
    return replace(base, **changes)


def _start(name: str, element: IntFormat | FloatFormat, scale: ScaleFormat) -> BlockFormat:
    size = 16 if scale == ScaleFormat.E4M3 else 32
    return BlockFormat(name, element, scale, size, _default_rule(scale))


def _name_of(element: Any, scale: ScaleFormat) -> str:
    for format in NAMED.values():
        if format.element == element and format.scale == scale != ScaleFormat.FP32:
            return format.name
    return notation.automatic_name(element, scale)


def to_plain(format: BlockFormat) -> Any:
    """What `block_format` reads: a name, or plain data with what the name does not say."""
    base, plain = named(format.name), dict[str, Any](name=format.name)
    if base is None:
        base = _start(format.name, format.element, format.scale)
        plain |= {"element": notation.plain_of(format.element)}
        plain |= {} if format.scale == ScaleFormat.E8M0 else {"scale": format.scale.value}
    for field, value in vars(format).items():
        if value != getattr(base, field) and field != "name":
            plain[field] = notation.plain_of(value)
    if (symmetry := notation.symmetry(base.element, format.element)) is not None:
        del plain["element"]
        plain["symmetric"] = symmetry
    return plain if len(plain) > 1 else format.name
