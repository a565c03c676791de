"""The seam: what an operand is and how two of them are multiplied.

`linear.py` decides which operands there are and how long one lives; a backend decides how one is
held. Faster arithmetic for the same recipe comes in here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lowbit import bf16, kernels
from lowbit.definition.noise import Key
from lowbit.formats import BlockFormat
from lowbit.quantize import QuantizedTensor, quantize, quantize_values


@dataclass(frozen=True)
class Operand:
    """A matrix ready to be multiplied: values, and FP32 scales kept outside the product."""

    values: Tensor
    scale: Tensor | None = None  #: a scalar, or one for each line that is contracted: [rows, 1]

    @property
    def T(self) -> "Operand":  # noqa: N802  (torch's name)
        scale = None if self.scale is None else self.scale.t()
        return replace(self, values=self.values.t(), scale=scale)

    def dequantized(self) -> Tensor:
        """The matrix that it stands for, FP32 or wider."""
        values = self.values.to(torch.promote_types(self.values.dtype, torch.float32))
        return values if self.scale is None else values * self.scale

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All that it holds, for autograd to keep."""
        return self.values, self.scale

    @classmethod
    def of(cls, tensors: Sequence[Tensor], dim: int) -> "Operand":
        """Of those, as they were; blocked along `dim`."""
        return cls(*tensors)


class PlainOperand(Operand):
    """Not quantized: two of them are multiplied by the calls that `nn.Linear` makes."""


Wanted = tuple[BlockFormat, Key | None]


class Backend(Protocol):
    """How operands are held and multiplied."""

    name: str

    def operand(self, x: Tensor, format: BlockFormat | None, dim: int, key: Key | None) -> Operand:
        """The matrix `x`, quantized in blocks along `dim`, or as it is without a format."""

    def operands(self, x: Tensor, across: Wanted, down: Wanted) -> tuple[Operand, Operand]:
        """`operand` of one matrix twice: in blocks along its rows, and along its columns."""

    def stored(self, x: Tensor, format: BlockFormat, dim: int, key: Key | None) -> QuantizedTensor:
        """What a later `operand` of `x` can be made of, in codes and scales."""

    def restored(self, stored: QuantizedTensor, dtype: torch.dtype) -> Operand:
        """That operand; `dtype` is that of `x`."""

    def matmul(self, a: Operand, b: Operand, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """a @ b + bias in `dtype`."""


def one_by_one(
    backend: Backend, x: Tensor, across: Wanted, down: Wanted
) -> tuple[Operand, Operand]:
    """`Backend.operands` where one read of `x` saves nothing."""
    first = backend.operand(x, across[0], 1, across[1])
    return first, backend.operand(x, down[0], 0, down[1])


class Emulate:
    """Operands hold quantized values in the compute dtype; `lowbit.bf16` multiplies them.

    Nothing is lost in BF16 where code x scale fits its 8 significant bits (`fits_bf16`); other
    formats are multiplied in FP32. Outer scales are applied to the finished product in FP32.
    """

    name = "emulate"

    def operand(self, x: Tensor, format: BlockFormat | None, dim: int, key: Key | None) -> Operand:
        """Of one GEMM: `x` in `format`, in blocks along `dim`."""
        if format is None:
            return PlainOperand(x)
        if (done := kernels.operand(x, format, dim, key)) is not None:
            return Operand(*done)
        lossless = x if format.fits_bf16 and x.dtype is torch.bfloat16 else x.float()
        values, scale = quantize_values(lossless, format, dim, key=key)
        return Operand(values.bfloat16() if lossless.dtype is torch.bfloat16 else values, scale)

    def operands(self, x: Tensor, across: Wanted, down: Wanted) -> tuple[Operand, Operand]:
        """Both operands made of one tensor: blocks along its rows, and along its columns."""
        if (done := kernels.operands(x, across, down)) is not None:
            return Operand(*done[0]), Operand(*done[1])
        return one_by_one(self, x, across, down)

    def stored(self, x: Tensor, format: BlockFormat, dim: int, key: Key | None) -> QuantizedTensor:
        """The codes of an operand, to be kept for later."""
        return quantize(x, format, dim, key=key)

    def restored(self, stored: QuantizedTensor, dtype: torch.dtype) -> Operand:
        """The operand that `stored` holds."""
        exact = dtype is torch.bfloat16 and stored.format.fits_bf16
        return Operand(stored.values().to(dtype if exact else torch.float32), stored.outer_scale)

    def matmul(self, a: Operand, b: Operand, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The product of two operands, in `dtype`."""
        common = torch.promote_types(a.values.dtype, b.values.dtype)
        left, right = a.values.to(common), b.values.to(common)
        scales = [operand.scale for operand in (a, b) if operand.scale is not None]
        plain = isinstance(a, PlainOperand) and isinstance(b, PlainOperand)
        multiply = bf16.torch_matmul if plain else bf16.matmul
        if not scales:
            return multiply(left, right, None if bias is None else bias.to(common)).to(dtype)
        if common is torch.bfloat16:
            return _scaled_product(left, right, scales, bias).to(dtype)
        product = multiply(left, right)
        for scale in scales:
            product = product.float() * scale
        return (product if bias is None else product + bias).to(dtype)


def _scaled_product(
    left: Tensor, right: Tensor, scales: Sequence[Tensor], bias: Tensor | None
) -> Tensor:
    """(left @ right) x scales + bias of BF16 matrices, not rounded to BF16 before the end."""
    native = left.device.type == "cpu" and bf16.products("cpu") == "native"
    numbers = native and all(type(scale) is Tensor and scale.dim() == 0 for scale in scales)
    if numbers and not torch.compiler.is_compiling():  # whose numbers cost no wait
        alpha = math.prod(map(float, scales))
        start, beta = (left.new_zeros(()), 0) if bias is None else (bias.to(left.dtype), 1)
        return torch.addmm(start, left, right, beta=beta, alpha=alpha)  # oneDNN scales its sums
    if left.device.type == "cuda":
        product = torch.mm(left, right, out_dtype=torch.float32)
    else:
        product = left.float() @ right.float()
    for scale in scales:
        product = product * scale
    return product if bias is None else product + bias


def block_matmul(
    a: Tensor, b: Tensor, a_format: BlockFormat | None, b_format: BlockFormat | None = None
) -> Tensor:
    """a [M, K] @ b [N, K]ᵀ with both operands quantized in blocks along K; dtype of `a`."""
    backend = Emulate()
    left = backend.operand(a, a_format, 1, None)
    right = backend.operand(b, b_format, 1, None)
    return backend.matmul(left, right.T, None, a.dtype)
