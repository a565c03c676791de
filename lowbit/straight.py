"""Products of operands through which gradients pass straight: what a second backward needs.

A layer's gradients are products of operands too. Asked for a graph of them (`create_graph=True`),
they are computed by these instead: the same products, and on their way back

    product = Q(left) Q(right)     grad_left = g Q(right)ᵀ     grad_right = Q(left)ᵀ g

with Q as the identity, once and any number of times more. `g` is not quantized, sums are FP32.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowbit.backend import Operand
from lowbit.operands import Operands


@dataclass(frozen=True)
class Straight:
    """An operand beside the matrix, rotated where it was, that it was made of."""

    operand: Operand
    source: Tensor

    @property
    def T(self) -> "Straight":  # noqa: N802  (torch's name)
        return replace(self, operand=self.operand.T, source=self.source.t())


@dataclass(frozen=True)
class StraightOperands:
    """As `Operands`, differentiable."""

    plain: Operands

    def __call__(self, name: str, x: Tensor) -> Straight:
        """The operand called `name`, from the unquantized matrix `x`."""
        numerics = self.plain.numerics
        source = numerics.rotated(numerics.recipe.role(name), x)
        with torch.no_grad():
            return Straight(self.plain(name, x), source)

    def restored_input(
        self, saved: Sequence[Tensor], kind: type[Operand] | None, dtype: torch.dtype
    ) -> Straight:
        """Of an input that has no gradient."""
        operand = self.plain.restored_input(saved, kind, dtype)
        return Straight(operand, operand.dequantized().to(dtype))

    def matmul(self, a: Straight, b: Straight, dtype: torch.dtype) -> Tensor:
        """a @ b."""
        product: Tensor = _Product.apply(  # type: ignore[no-untyped-call]  # torch's
            a.source, b.source, (a.operand, b.operand), self.plain, dtype
        )
        return product


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        left: Tensor,
        right: Tensor,
        operands: tuple[Operand, Operand],
        q: Operands,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.operands = operands
        return q.matmul(*operands, dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(g.device.type, enabled=False):
            left, right = (
                _Through.apply(source, operand)  # type: ignore[no-untyped-call]  # torch's
                for source, operand in zip(ctx.saved_tensors, ctx.operands, strict=True)
            )
            wide = g.to(left.dtype)
            grads = wide @ right.t(), left.t() @ wide
            sources = ctx.saved_tensors
            return *(x.to(s.dtype) for x, s in zip(grads, sources, strict=True)), None, None, None


class _Through(torch.autograd.Function):
    """The values of an operand, FP32 or wider; the gradient is its source's."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, operand: Operand) -> Tensor:
        ctx.dtype = source.dtype
        rows, columns = source.shape
        values = operand.dequantized()[:rows, :columns]  # machines fill up the contraction
        return values.to(torch.promote_types(source.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g.to(ctx.dtype), None
