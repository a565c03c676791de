"""A linear layer whose three GEMMs take quantized operands, each from the unquantized tensor."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.backend import Backend, Emulate, Operand
from lowbit.formats import Rounding
from lowbit.keep import Keep, KeptWeights
from lowbit.noise import Key, Randomness
from lowbit.quantize import QuantizedTensor
from lowbit.recipe import OPERANDS, QuantRecipe
from lowbit.rotation import rotate


@dataclass(frozen=True)
class LayerNumerics:
    """All that says how one layer computes, at one moment."""

    recipe: QuantRecipe
    backend: Backend
    key: Key | None = None
    stores_input: bool = False  #: as codes, between forward and backward
    weights: KeptWeights | None = None

    def operand(self, name: str, x: Tensor, dim: int) -> Operand:
        """The operand called `name`, from the unquantized matrix `x`, blocked along `dim`."""

        format = self.recipe.format(name)

        def make() -> Operand:
            return self.backend.operand(self.rotated(name, x, dim), format, dim, self.key_of(name))

        if self.weights is not None and format is not None and name in self.recipe.weights:
            return self.weights.operand(name, make)
        return make()

    def rotated(self, name: str, x: Tensor, dim: int) -> Tensor:
        """`x` as the quantizer of the operand called `name` receives it."""
        rotation = self.recipe.rotation(name.split("_")[0])
        return rotate(x, rotation, dim) if rotation else x

    def key_of(self, name: str) -> Key | None:
        """The random numbers of an operand; None where it is rounded deterministically."""
        format = self.recipe.format(name)
        if format is None or format.rounding is not Rounding.STOCHASTIC:
            return None
        assert self.key is not None
        key = self.key.fold(OPERANDS.index(name))
        # all ranks and micro-batches see the same weight
        return key.at(0) if name in self.recipe.weights else key

    def grad_operands(self, grad_output: Tensor) -> tuple[Operand, Operand]:
        """grad_output for dgrad and for wgrad: in one read where both take it as it is."""
        names = "dgrad_grad_output", "wgrad_grad_output"
        across, down = map(self.recipe.format, names)
        rotated = self.recipe.dgrad_rotation or self.recipe.wgrad_rotation
        if across is None or down is None or rotated:
            first, second = (self.operand(n, grad_output, 1 - i) for i, n in enumerate(names))
            return first, second
        keys = map(self.key_of, names)
        return self.backend.operands(grad_output, *zip((across, down), keys, strict=True))

    # One function a GEMM: its operands are gone when it returns.

    def output(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """fprop: input [tokens, in], weight [out, in]."""
        a = self.operand("fprop_input", input, dim=1)
        b = self.operand("fprop_weight", weight, dim=1)
        return self.backend.matmul(a, b.T, bias, input.dtype)

    def grad_input(self, grad_output: Tensor, weight: Tensor, a: Operand | None = None) -> Tensor:
        """dgrad: grad_output [tokens, out], or `a`, what `grad_operands` made of it."""
        a = a or self.operand("dgrad_grad_output", grad_output, dim=1)
        if self.recipe.reuse_fprop_weight:
            b = self.operand("fprop_weight", weight, dim=1)
        else:
            b = self.operand("dgrad_weight", weight, dim=0)
        return self.backend.matmul(a, b, None, grad_output.dtype)

    def grad_weight(
        self, grad_output: Tensor, input: tuple[Tensor, ...], a: Operand | None = None
    ) -> Tensor:
        """wgrad, with blocks over the tokens; `input` as `saved_input` left it."""
        a = a or self.operand("wgrad_grad_output", grad_output, dim=0)
        if len(input) == 1:
            b = self.operand("wgrad_input", input[0], dim=0)
        else:
            format = self.recipe.format("wgrad_input")
            assert format is not None
            codes, scale, *above = input
            stored = QuantizedTensor(codes, scale, above[0] if above else None, format, 0)
            b = self.backend.restored(stored, grad_output.dtype)
        return self.backend.matmul(a.T, b, None, grad_output.dtype)

    def saved_input(self, input: Tensor) -> tuple[Tensor, ...]:
        """What wgrad needs of the input: itself, or the codes and scales of its operand."""
        format = self.recipe.format("wgrad_input")
        if format is None or not self.stores_input:
            return (input,)
        x = self.rotated("wgrad_input", input, 0)
        stored = self.backend.stored(x, format, 0, self.key_of("wgrad_input"))
        above = () if stored.tensor_scale is None else (stored.tensor_scale,)
        return stored.codes, stored.scale, *above


class _QuantizedLinear(torch.autograd.Function):
    """input [tokens, in], weight [out, in]; saves no more than the unquantized layer."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, numerics: LayerNumerics
    ) -> Tensor:
        ctx.save_for_backward(weight, *numerics.saved_input(input))
        ctx.numerics = numerics
        return numerics.output(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        weight, *input = ctx.saved_tensors
        numerics: LayerNumerics = ctx.numerics
        grad_input = grad_weight = grad_bias = None
        for_dgrad = for_wgrad = None
        if ctx.needs_input_grad[0] and ctx.needs_input_grad[1]:
            for_dgrad, for_wgrad = numerics.grad_operands(grad_output)
        if ctx.needs_input_grad[0]:
            grad_input = numerics.grad_input(grad_output, weight, for_dgrad)
        del for_dgrad  # no operand outlives its GEMM
        if ctx.needs_input_grad[1]:
            grad_weight = numerics.grad_weight(grad_output, tuple(input), for_wgrad)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_output.sum(0)
        return grad_input, grad_weight, grad_bias, None


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
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            input, weight = input.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        numerics = self.numerics()
        if numerics.weights is not None:
            drawn = None if numerics.key is None else int(numerics.key.state)
            numerics.weights.keep_for(self.weight, weight.dtype, self.recipe, self.backend, drawn)
        with torch.autocast(device, enabled=False):  # operands held in FP32 stay so
            matrix = input.reshape(-1, self.in_features)
            output: Tensor = _QuantizedLinear.apply(matrix, weight, bias, numerics)  # type: ignore[no-untyped-call]  # torch's
        return output.reshape(*input.shape[:-1], self.out_features)

    def numerics(self) -> LayerNumerics:
        """How it computes now."""
        key = self.randomness.key(self.index) if self.recipe.is_random and self.randomness else None
        kept = self._kept_weights if self.keep.quantized_weights else None
        return LayerNumerics(self.recipe, self.backend, key, self.keep.quantized_inputs, kept)

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
