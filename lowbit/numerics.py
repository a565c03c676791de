"""How one layer computes: which operands its three GEMMs take, and how long each of them lives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowbit.backend import Backend, Operand
from lowbit.definition.noise import Key
from lowbit.definition.rotation import rotate
from lowbit.formats import BlockFormat, Rounding
from lowbit.keep import KeptWeights
from lowbit.quantize import QuantizedTensor
from lowbit.recipe import OPERANDS, QuantRecipe
from lowbit.shared import Made


@dataclass(frozen=True)
class LayerNumerics:
    """All that says how one layer computes, at one moment."""

    recipe: QuantRecipe
    backend: Backend
    key: Key | None = None
    stores_input: bool = False  #: as codes, between forward and backward
    weights: KeptWeights | None = None
    owns_input: bool = False  #: a cast, which nobody else keeps until backward

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

    def shared(self, name: str, dim: int, made: Made, make: Callable[[], Any]) -> Any:
        """What `make` makes of the operand's input, if it is not among what was `made` already."""
        format = self.recipe.format(name)
        if format is None or format.rounding is Rounding.STOCHASTIC:
            return make()
        rotation = self.recipe.rotation(name.split("_")[0])
        what = self.backend, format, rotation, dim, self.stores_input and name == "wgrad_input"
        if what not in made:
            made[what] = make()
        return made[what]

    # One function a GEMM: its operands are gone when it returns.

    def output(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, made: Made | None = None
    ) -> Tensor:
        """fprop: input [tokens, in], weight [out, in]; `made` of that input by other layers."""
        make = partial(self.operand, "fprop_input", input, 1)
        a = self.shared("fprop_input", 1, {} if made is None else made, make)
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

    def grad_weight(self, grad_output: Tensor, b: Operand, a: Operand | None = None) -> Tensor:
        """wgrad, with blocks over the tokens; `b` is `wgrad_input`."""
        a = a or self.operand("wgrad_grad_output", grad_output, dim=0)
        return self.backend.matmul(a.T, b, None, grad_output.dtype)

    def saved_input(
        self, input: Tensor, made: Made
    ) -> tuple[tuple[Tensor | None, ...], type[Operand] | None]:
        """What wgrad needs of the input: itself, or the codes and scales of its operand.

        Or the operand, of the type returned: made where the input is still in the cache, if it
        takes its place, so that the memory is the same.
        """
        format = self.recipe.format("wgrad_input")
        if format is None:
            return (input,), None
        if self.stores_input:
            stored = self.shared("wgrad_input", 0, made, partial(self._stored, input, format))
            above = () if stored.tensor_scale is None else (stored.tensor_scale,)
            return (stored.codes, stored.scale, *above), None
        small = format.fits_bf16 and not self.recipe.wgrad_rotation
        if self.owns_input and small and input.dtype is torch.bfloat16:
            make = partial(self.operand, "wgrad_input", input, 0)
            operand = self.shared("wgrad_input", 0, made, make)
            return operand.tensors, type(operand)
        return (input,), None

    def _stored(self, input: Tensor, format: BlockFormat) -> QuantizedTensor:
        x = self.rotated("wgrad_input", input, 0)
        return self.backend.stored(x, format, 0, self.key_of("wgrad_input"))

    def wgrad_input(
        self, saved: Sequence[Tensor], kind: type[Operand] | None, dtype: torch.dtype
    ) -> Operand:
        """wgrad's operand of what `saved_input` returned; `dtype` is that of the input."""
        if kind is not None:
            return kind.of(saved, 0)
        if len(saved) == 1:
            return self.operand("wgrad_input", saved[0], dim=0)
        format = self.recipe.format("wgrad_input")
        assert format is not None
        codes, scale, *above = saved
        stored = QuantizedTensor(codes, scale, above[0] if above else None, format, 0)
        return self.backend.restored(stored, dtype)
