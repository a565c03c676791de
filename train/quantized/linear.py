"""A linear layer with a stored weight: as an engine computes it."""

import torch.nn.functional as F
from torch import Tensor, nn

from lowbit import BlockFormat, Transform, fake_quantize, transformed


class StoredLinear(nn.Module):
    """Q(x M) Ŵᵀ + bias, for a weight Ŵ [out, in] that is quantized and transformed already.

    Not an `nn.Linear`: what converts those (a recipe) must leave it alone.
    """

    weight: Tensor

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        activations: BlockFormat | None = None,
        transform: Transform | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.activations, self.transform = activations, transform

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return F.linear(self.operand(input).to(self.weight.dtype), self.weight, self.bias)

    def operand(self, input: Tensor) -> Tensor:
        """The input as the product takes it."""
        x = transformed(input, self.transform) if self.transform else input
        return fake_quantize(x, self.activations) if self.activations else x

    def extra_repr(self) -> str:
        """Shape, and what inputs go through."""
        rows, columns = self.weight.shape
        return f"{columns} -> {rows}, activations={self.activations}, transform={self.transform}"
