"""A linear layer whose three GEMMs take quantized operands, each from the unquantized tensor."""

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.backend import Backend, Emulate
from lowbit.definition.noise import Randomness
from lowbit.keep import Keep, KeptWeights
from lowbit.numerics import LayerNumerics
from lowbit.recipe import OPERANDS, QuantRecipe
from lowbit.shared import LatestInput, Made

_latest = LatestInput()


class _QuantizedLinear(torch.autograd.Function):
    """input [tokens, in], weight [out, in]; saves no more than the unquantized layer."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        numerics: LayerNumerics,
        made: Made,
    ) -> Tensor:
        saved, ctx.kind = numerics.saved_input(input, made)
        ctx.save_for_backward(weight, *saved)
        ctx.numerics = numerics
        return numerics.output(input, weight, bias, made)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        weight, *saved = ctx.saved_tensors
        numerics: LayerNumerics = ctx.numerics
        grad_input = grad_weight = grad_bias = None
        for_dgrad = for_wgrad = None
        if ctx.needs_input_grad[0] and ctx.needs_input_grad[1]:
            for_dgrad, for_wgrad = numerics.grad_operands(grad_output)
        if ctx.needs_input_grad[0]:
            grad_input = numerics.grad_input(grad_output, weight, for_dgrad)
        del for_dgrad  # no operand outlives its GEMM
        if ctx.needs_input_grad[1]:
            input = numerics.wgrad_input(saved, ctx.kind, grad_output.dtype)
            grad_weight = numerics.grad_weight(grad_output, input, for_wgrad)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_output.sum(0)
        return grad_input, grad_weight, grad_bias, None, None


class QuantLinear(nn.Linear):
    """`nn.Linear` under a recipe; the same parameters, state_dict keys, shapes and dtypes.

    Input [..., in_features]. Under autocast, input, weight and bias are cast as `nn.Linear`'s are,
    and quantized as the GEMM would have received them.
    """

    recipe: QuantRecipe
    backend: Backend
    randomness: Randomness | None  #: for stochastic rounding
    index: int  #: of the layer in the model: its stream of random numbers
    keep: Keep
    _kept_weights: KeptWeights

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        recipe: QuantRecipe,
        *,
        backend: Backend | None = None,
        randomness: Randomness | None = None,
        index: int = 0,
        keep: Keep | None = None,
    ) -> "QuantLinear":
        """A quantized layer that shares `linear`'s parameters."""
        bias = linear.bias is not None
        layer = cls(linear.in_features, linear.out_features, bias, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.train(linear.training)
        layer.backend, layer.randomness, layer.index = backend or Emulate(), randomness, index
        layer.keep, layer._kept_weights = keep or Keep(), KeptWeights()
        layer.set_recipe(recipe)
        return layer

    def set_recipe(self, recipe: QuantRecipe) -> None:
        """Compute under `recipe` from now on; ValueError if a block does not divide the layer."""
        _check_widths(recipe, self.in_features, self.out_features)
        if recipe.is_random and self.randomness is None:
            raise ValueError("stochastic rounding needs randomness=Randomness(seed)")
        self.recipe = recipe

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        device = input.device.type
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        owns_input = False
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else input.dtype
        made = _latest.made_of(input, dtype)
        if autocast:
            owns_input = input.dtype is not dtype and not torch.compiler.is_compiling()
            input, weight = input.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        numerics = self.numerics(owns_input and torch.is_grad_enabled() and weight.requires_grad)
        if numerics.weights is not None:
            drawn = None if numerics.key is None else int(numerics.key.state)
            numerics.weights.keep_for(self.weight, weight.dtype, self.recipe, self.backend, drawn)
        with torch.autocast(device, enabled=False):  # operands held in FP32 stay so
            matrix = input.reshape(-1, self.in_features)
            output: Tensor = _QuantizedLinear.apply(matrix, weight, bias, numerics, made)  # type: ignore[no-untyped-call]  # torch's
        return output.reshape(*input.shape[:-1], self.out_features)

    def numerics(self, owns_input: bool = False) -> LayerNumerics:
        """How it computes now."""
        key = self.randomness.key(self.index) if self.recipe.is_random and self.randomness else None
        kept = self._kept_weights if self.keep.quantized_weights else None
        stores = self.keep.quantized_inputs
        return LayerNumerics(self.recipe, self.backend, key, stores, kept, owns_input)

    def extra_repr(self) -> str:
        """The recipe beside the shape."""
        table = ", ".join(f"{operand}={text}" for operand, text in self.recipe.table().items())
        return f"{super().extra_repr()}, {table}"


def _check_widths(recipe: QuantRecipe, in_features: int, out_features: int) -> None:
    """Feature widths must be whole blocks; tokens need not be, they are filled with zeros."""
    axes = {"fprop": ("in_features", in_features), "dgrad": ("out_features", out_features)}
    for operand in OPERANDS[:4]:
        axis, width = axes[operand.split("_")[0]]
        sizes: dict[str, int] = {}
        format, rotation = recipe.format(operand), recipe.rotation(operand.split("_")[0])
        if rotation:
            sizes[f"{operand}'s rotation size"] = rotation.size
        if format is not None and isinstance(format.block_size, tuple):
            rows, columns = format.block_size
            if out_features % rows or in_features % columns:
                raise ValueError(
                    f"weight shape {out_features} x {in_features} is not a multiple of "
                    f"{operand}={format}"
                )
        elif format is not None and isinstance(format.block_size, int) and format.block_size != -1:
            sizes[f"{operand}={format}, block_size"] = format.block_size
        for what, size in sizes.items():
            if width % size:
                raise ValueError(f"{axis}={width} is not a multiple of {what} {size}")
