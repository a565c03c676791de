"""The arithmetic of an integer machine: INT8 codes multiplied exactly, block by block.

    product[m, n] = sum over blocks of  scale_a[m, block] scale_b[n, block]  sum of a[m, k] b[n, k]

The inner sum is an INT32, the outer one FP32 in a fixed order. `Emulate` multiplies the same
quantized values: it differs in the order of accumulation, and for scales that are not powers of two
in its rounding, alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit import kernels
from lowbit.backend import Emulate, Operand, PlainOperand, one_by_one
from lowbit.definition.noise import Key
from lowbit.formats import Arithmetic, BlockFormat, IntFormat
from lowbit.quantize import QuantizedTensor, quantize
from lowbit.recipe import GEMMS, QuantRecipe


@dataclass(frozen=True)
class IntegerOperand(Operand):
    """Codes [rows, K] in `values`, whatever the axis along which the matrix was blocked."""

    block_scales: Tensor | None = None  #: FP32 [rows, blocks]
    blocked_dim: int = 1  #: of the matrix that this stands for

    @property
    def T(self) -> "IntegerOperand":  # noqa: N802  (torch's name)
        scale = None if self.scale is None else self.scale.t()
        return replace(self, blocked_dim=1 - self.blocked_dim, scale=scale)

    def dequantized(self) -> Tensor:
        """With the columns that fill up the last block."""
        assert self.block_scales is not None
        size = self.values.shape[1] // max(self.block_scales.shape[1], 1)
        values = self.values.float() * self.block_scales.repeat_interleave(size, 1)
        matrix = values if self.blocked_dim == 1 else values.t()
        return matrix if self.scale is None else matrix * self.scale

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """With the scales."""
        return self.values, self.scale, self.block_scales

    @classmethod
    def of(cls, tensors: Sequence[Tensor], dim: int) -> "IntegerOperand":
        """With the axis."""
        values, scale, block_scales = tensors
        return cls(values, scale, block_scales, dim)


_TAKES = (
    "it takes integer elements on both sides, 1-D blocks of a multiple of 16 (or -1), FP32 "
    "arithmetic, float32 or bfloat16"
)


def _takes(format: BlockFormat) -> bool:
    size = format.block_size
    whole = isinstance(size, int) and (size == -1 or size % 16 == 0)
    integer = isinstance(format.element, IntFormat)
    return whole and integer and format.arithmetic is Arithmetic.FP32


def _whole_blocks(codes: Tensor, format: BlockFormat) -> Tensor:
    size = format.block_size
    assert isinstance(size, int)
    missing = -codes.shape[1] % (16 if size == -1 else size)
    return F.pad(codes, (0, missing)) if missing else codes


class Integer:
    """Operands hold INT8 codes and scales. For integer elements in 1-D blocks, on CPUs.

    A GEMM of two unquantized operands is that of the baseline; one of a quantized and an
    unquantized operand has no integer product: ValueError.
    """

    name = "integer"

    def __init__(self) -> None:
        self._plain = Emulate()
        if not kernels.enabled():
            raise ValueError("the integer backend needs the compiled kernels (LOWBIT_KERNELS)")

    @staticmethod
    def check(recipe: QuantRecipe) -> None:
        """ValueError for a recipe with a quantized GEMM that has no integer product."""
        if recipe.reuse_fprop_weight:
            raise ValueError("the integer backend cannot reuse fprop's weight copy in dgrad")
        for gemm, operands in GEMMS.items():
            formats = [recipe.format(operand) for operand in operands]
            if formats == [None, None]:
                continue
            if not all(format is not None and _takes(format) for format in formats):
                names = " and ".join(str(format or "bf16") for format in formats)
                raise ValueError(f"the integer backend has no {gemm} of {names}: {_TAKES}")

    def operand(self, x: Tensor, format: BlockFormat | None, dim: int, key: Key | None) -> Operand:
        """Codes and scales of the matrix `x`; ValueError for a format without a product."""
        if format is None:
            return PlainOperand(x)
        if not _takes(format) or x.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"the integer backend has no {format} of {x.dtype}: {_TAKES}")
        if not x.numel():  # no tokens: nothing to read
            codes = x.movedim(dim, 1).to(torch.int8)
            return IntegerOperand(codes, None, codes[:, :1].float(), dim)
        if not kernels.takes(format):
            return self.restored(self.stored(x, format, dim, key), x.dtype)
        codes, scales, above = kernels.codes(x, format, dim, key)
        return IntegerOperand(_whole_blocks(codes, format), above, scales, dim)

    def stored(self, x: Tensor, format: BlockFormat, dim: int, key: Key | None) -> QuantizedTensor:
        """`quantize`, whose codes are the product's."""
        return quantize(x, format, dim, key=key)

    def restored(self, stored: QuantizedTensor, dtype: torch.dtype) -> Operand:
        """The codes as they were stored."""
        codes, scales = (x.movedim(stored.dim, -1) for x in (stored.codes, stored.scale_values()))
        whole = _whole_blocks(codes.contiguous(), stored.format)
        return IntegerOperand(whole, stored.tensor_scale, scales, stored.dim)

    operands = one_by_one

    def matmul(self, a: Operand, b: Operand, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """INT32 within a block, FP32 across; `a` blocked along its rows, `b` along its columns."""
        if not isinstance(a, IntegerOperand) and not isinstance(b, IntegerOperand):
            return self._plain.matmul(a, b, bias, dtype)
        if not isinstance(a, IntegerOperand) or not isinstance(b, IntegerOperand):
            raise ValueError("the integer backend cannot multiply a quantized and a plain operand")
        assert (a.blocked_dim, b.blocked_dim) == (1, 0), "blocks lie along the contraction"
        assert a.block_scales is not None and b.block_scales is not None
        if not a.values.numel() or not b.values.numel():
            nothing = a.block_scales.new_zeros(len(a.values), len(b.values))
            return (nothing if bias is None else nothing + bias).to(dtype)
        if a.block_scales.shape[1] != b.block_scales.shape[1]:
            raise ValueError("the integer backend needs the same block size in both operands")
        scales = [operand.scale for operand in (a, b) if operand.scale is not None]
        whole = dtype is torch.bfloat16 and not scales and bias is None
        product: Tensor = torch.ops.lowbit.integer_matmul(
            a.values, a.block_scales, b.values, b.block_scales, dtype if whole else torch.float32
        )
        for scale in scales:
            product = product * scale
        return (product if bias is None else product + bias).to(dtype)
