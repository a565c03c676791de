"""How a layer makes its operands, and how long each of them lives.

| scope          | what lives that long                     | why it is still right              |
|----------------|------------------------------------------|------------------------------------|
| siblings       | what q, k, v make of their one input     | in `Reuse`, same tensor and version|
| backward       | wgrad's input, its codes, or the operand | held by the graph of this forward  |
| optimizer step | a weight's operands (`Keep`)             | in `Reuse`, same version, numerics |
| one read       | a gradient's operands of dgrad and wgrad | made and used in one backward      |
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowbit import bf16
from lowbit.backend import Backend, Operand, PlainOperand
from lowbit.definition.noise import Key
from lowbit.definition.rotation import rotate
from lowbit.formats import BlockFormat, Rounding
from lowbit.quantize import QuantizedTensor
from lowbit.recipe import ROLES, QuantRecipe, Role
from lowbit.reuse import Keep, KeptWeight, Made, Reuse


@dataclass(frozen=True)
class LayerNumerics:
    """All that says how one layer computes: taken at a forward, and true for all that follows."""

    recipe: QuantRecipe
    backend: Backend
    key: Key | None = None
    keep: Keep = Keep()
    reuse: Reuse | None = None
    products: bf16.Products = "native"

    def matmul(self, a: Operand, b: Operand, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """a @ b + bias. Two unquantized operands: as `nn.Linear` would now."""
        if torch.compiler.is_compiling() or type(a) is type(b) is PlainOperand:
            return self.backend.matmul(a, b, bias, dtype)
        with bf16.as_captured(self.products):
            return self.backend.matmul(a, b, bias, dtype)

    def operand(self, name: str, x: Tensor) -> Operand:
        """The operand called `name`, from the unquantized matrix `x`."""
        role = self.recipe.role(name)
        format = self.recipe.format(role.name)
        return self.backend.operand(self.rotated(role, x), format, role.axis, self.key_of(role))

    def rotated(self, role: Role, x: Tensor) -> Tensor:
        """`x` as the quantizer of the operand with this role receives it."""
        rotation = self.recipe.rotation(role.gemm)
        return rotate(x, rotation, role.axis) if rotation else x

    def key_of(self, role: Role) -> Key | None:
        """The random numbers of an operand; None where it is rounded deterministically."""
        format = self.recipe.format(role.name)
        if format is None or format.rounding is not Rounding.STOCHASTIC:
            return None
        assert self.key is not None
        key = self.key.fold(role.stream)
        return key.at(0) if role.is_weight else key  # all ranks and micro-batches see one weight


@dataclass(frozen=True)
class Operands:
    """`q(name, x)`: the operands of one call of a layer, made or found."""

    numerics: LayerNumerics
    siblings: Made | None = None
    weights: KeptWeight | None = None
    read: Made = field(default_factory=dict)  #: with another, and not used yet

    def __call__(self, name: str, x: Tensor) -> Operand:
        """The operand called `name`, from the unquantized matrix `x`."""
        if name in self.read:
            found: Operand = self.read.pop(name)
            return found
        role = self.numerics.recipe.role(name)
        make = partial(self.numerics.operand, name, x)
        if role.is_weight:
            known = self.weights.now() if self.weights else None
            known = known if self.numerics.recipe.format(role.name) else None
            return make() if known is None else _found(known, role.name, make)
        return self._shared(role, "values", make) if role.tensor == "input" else make()

    def read_once(self, grad_output: Tensor) -> "Operands":
        """With dgrad's and wgrad's operand of `grad_output` made in one read, if both take it as it
        is; each waits for its product alone.
        """
        recipe = self.numerics.recipe
        roles = [role for role in ROLES.values() if role.tensor == "grad_output"]
        formats = [recipe.format(role.name) for role in roles]
        if None in formats or any(recipe.rotation(role.gemm) for role in roles):
            return self
        wanted = zip(formats, map(self.numerics.key_of, roles), strict=True)
        made = self.numerics.backend.operands(grad_output, *wanted)  # type: ignore[arg-type]
        return replace(self, read=dict(zip((role.name for role in roles), made, strict=True)))

    def _shared(self, role: Role, what: str, make: Callable[[], Any]) -> Any:
        """What `make` makes of the input, unless a sibling has made it."""
        recipe = self.numerics.recipe
        format = recipe.format(role.name)
        known = self.siblings
        if known is None or format is None or format.rounding is Rounding.STOCHASTIC:
            return make()
        kind = self.numerics.backend, format, recipe.rotation(role.gemm), role.axis, what
        return _found(known, kind, make)

    def saved_input(
        self, input: Tensor, owned: bool
    ) -> tuple[tuple[Tensor | None, ...], type[Operand] | None] | None:
        """What wgrad needs of the input, if not itself: the codes and scales of its operand.

        Or the operand, of the type returned: made where the input is still in the cache, if it
        takes the place of a cast that is `owned` by this call, so that the memory is the same.
        """
        role = ROLES["wgrad_input"]
        format = self.numerics.recipe.format(role.name)
        if format is None:
            return None
        if self.numerics.keep.quantized_inputs:
            stored = self._shared(role, "codes", partial(self._stored, role, input, format))
            above = () if stored.tensor_scale is None else (stored.tensor_scale,)
            return (stored.codes, stored.scale, *above), None
        small = format.fits_bf16 and not self.numerics.recipe.wgrad_rotation
        if owned and small and input.dtype is torch.bfloat16:
            operand = self(role.name, input)
            return operand.tensors, type(operand)
        return None

    def _stored(self, role: Role, input: Tensor, format: BlockFormat) -> QuantizedTensor:
        numerics = self.numerics
        x = numerics.rotated(role, input)
        return numerics.backend.stored(x, format, role.axis, numerics.key_of(role))

    def matmul(self, a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
        """a @ b."""
        return self.numerics.matmul(a, b, None, dtype)

    def restored_input(
        self, saved: Sequence[Tensor], kind: type[Operand] | None, dtype: torch.dtype
    ) -> Operand:
        """wgrad's operand of what `saved_input` returned; `dtype` is that of the input."""
        if kind is not None:
            return kind.of(saved, 0)
        format = self.numerics.recipe.format("wgrad_input")
        assert format is not None
        codes, scale, *above = saved
        stored = QuantizedTensor(codes, scale, above[0] if above else None, format, 0)
        return self.numerics.backend.restored(stored, dtype)


def _found(made: Made, what: Any, make: Callable[[], Any]) -> Any:
    if what not in made:
        made[what] = make()
    return made[what]
