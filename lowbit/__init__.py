"""Block formats for training in PyTorch: quantizers, recipes and the linear layer they act in."""

from lowbit.backend import Backend, Emulate, Operand, block_matmul
from lowbit.census import Counting, census
from lowbit.convert import Conversion, conversion, convert_linears, enter_phase, unquantized
from lowbit.definition.given import Scales
from lowbit.definition.noise import Key, Randomness
from lowbit.definition.rotation import Rotation, rotate
from lowbit.definition.transforms import Transform, transformed
from lowbit.formats import (
    Arithmetic,
    BlockFormat,
    FloatFormat,
    IntFormat,
    OuterScale,
    Rounding,
    ScaleFormat,
    ScaleRounding,
    ScaleRule,
    block_format,
)
from lowbit.integer import Integer
from lowbit.linear import QuantLinear
from lowbit.policy import LayerPolicy, LayerRule
from lowbit.quantize import QuantizedTensor, fake_quantize, quantize
from lowbit.recipe import Phase, QuantRecipe
from lowbit.reuse import Keep, Reuse
from lowbit.stats import crest_factor, qsnr_db

__all__ = [
    "Arithmetic",
    "Backend",
    "BlockFormat",
    "Conversion",
    "Counting",
    "Emulate",
    "FloatFormat",
    "IntFormat",
    "Integer",
    "Keep",
    "Key",
    "LayerPolicy",
    "LayerRule",
    "Operand",
    "OuterScale",
    "Phase",
    "QuantLinear",
    "QuantRecipe",
    "QuantizedTensor",
    "Randomness",
    "Reuse",
    "Rotation",
    "Rounding",
    "ScaleFormat",
    "ScaleRounding",
    "ScaleRule",
    "Scales",
    "Transform",
    "block_format",
    "block_matmul",
    "census",
    "conversion",
    "convert_linears",
    "crest_factor",
    "enter_phase",
    "fake_quantize",
    "qsnr_db",
    "quantize",
    "rotate",
    "transformed",
    "unquantized",
]
