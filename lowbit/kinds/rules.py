"""The choices of a block format: which scale, which rounding, whose arithmetic."""

from enum import Enum

from lowbit.kinds.elements import FloatFormat, IntFormat, ScaleFormat


class ScaleRule(Enum):
    """Which power of two an E8M0 scale takes, for a block maximum `amax`; torchao's names."""

    RCEIL = "rceil"  #: ceil(log2(amax / max)): nothing clips (INT-v-FP study, NVIDIA 2506.08027)
    FLOOR = "floor"  #: floor(log2 amax) - emax (OCP MX v1.0 section 6.3, microxcaling): may clip
    CEIL = "ceil"  #: ceil(log2 amax) - emax: nothing clips
    EVEN = "even"  #: floor, after rounding amax to the element's mantissa width


class ScaleRounding(Enum):
    """Which of its two neighbours amax / max becomes, the largest scale not above it and the least
    not below: how other scales are chosen, and E8M0's as well by BEST.
    """

    NEAREST = "nearest"  #: GPUs' and engines' own (cuBLAS, Transformer Engine, torchao); may clip
    UP = "up"  #: the one above: nothing clips; no engine's
    BEST = "best"  #: that of the lesser squared error of its block; a search, no engine's
    FOUR_OVER_SIX = "four_over_six"
    """E2M1's: amax becomes 6 or 4, by the squared error of the block, each under the nearest scale;
    the tensor's largest is 256 where E4M3 has 448 (arXiv 2512.02010; an option of TE)."""


AnyRule = ScaleRule | ScaleRounding


def rules_of(scale: ScaleFormat, element: IntFormat | FloatFormat) -> tuple[AnyRule, ...]:
    """The rules that choose the scales of such elements, the default first; FP32 rounds none."""
    if scale == ScaleFormat.E8M0:
        return (*ScaleRule, ScaleRounding.BEST)
    if scale == ScaleFormat.FP32:
        return (ScaleRounding.NEAREST,)
    roundings = tuple(ScaleRounding)
    return roundings if scale.is_minifloat and element.label == "e2m1" else roundings[:3]


class Rounding(Enum):
    """How a scaled value becomes an element."""

    NEAREST = "nearest"  #: to the nearest, ties to even
    HALF_AWAY = "half_away"  #: to the nearest, ties away from zero (microxcaling's default)
    STOCHASTIC = "stochastic"  #: up with the probability of the remainder: unbiased


class Arithmetic(Enum):
    """The precision and order in which scale and quotient are computed."""

    FP32 = "fp32"  #: with exact exponents
    BF16 = "bf16"  #: rounded to BF16 after every operation, log2 included, as the study's code does
    TORCHAO = "torchao"  #: NVFP4's owners, each with its own: definition/owners.py
    COMPRESSED_TENSORS = "compressed_tensors"
    TRANSFORMER_ENGINE = "transformer_engine"

    @property
    def is_owners(self) -> bool:
        """Whether it is that of an engine's own NVFP4."""
        return self not in (Arithmetic.FP32, Arithmetic.BF16)


class OuterScale(Enum):
    """What stands above the block scales, in FP32."""

    NONE = "none"
    TENSOR = "tensor"  #: one for the whole tensor
    ROW = "row"
    """One for each line of blocks, along the axis that the GEMM contracts: one for each token of
    fprop's input, whose blocks then depend on no other token; of weights for each output, of
    wgrad's operands, whose contraction runs over the tokens, for each feature."""
