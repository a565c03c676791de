"""A linear layer whose three GEMMs take quantized operands, each from the unquantized tensor."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit import bf16
from lowbit.backend import Backend, Emulate
from lowbit.definition.noise import Randomness
from lowbit.operands import LayerNumerics, Operands
from lowbit.recipe import OPERANDS, ROLES, QuantRecipe
from lowbit.recompute import as_at_first, as_at_first_in_graph
from lowbit.reuse import Keep, reused_now
from lowbit.straight import StraightOperands
from lowbit.uses import check_dtypes, check_input


class _QuantizedLinear(torch.autograd.Function):
    """input [..., in], weight [out, in]; saves no more than the unquantized layer."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, q: Operands, owned: bool
    ) -> Tensor:
        matrix, recipe = _matrix(input), q.numerics.recipe
        for_weight = ctx.needs_input_grad[1]
        saved = q.saved_input(matrix, owned) if for_weight else None
        ctx.kind, ctx.replaced = saved and saved[1], saved is not None
        kept = saved[0] if saved else (input if for_weight else None,)
        ctx.save_for_backward(weight, *kept)
        ctx.q, ctx.by_columns = Operands(q.numerics, weights=q.weights), _lies_by_columns(matrix)
        if not recipe.quantizes("fprop"):
            return F.linear(input, weight, bias)  # whatever it does for this shape
        a, b = q("fprop_input", matrix), q("fprop_weight", weight).T
        output = q.numerics.matmul(a, b, bias, input.dtype)
        return output.reshape(*input.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        weight, *saved = ctx.saved_tensors
        g, q = _matrix(grad_output), ctx.q
        for_input, for_weight, for_bias, *_ = ctx.needs_input_grad
        grad_input = grad_weight = None
        with _without_autocast(g.device.type):
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                q = StraightOperands(q)
            elif for_input and for_weight:
                q = q.read_once(g)
            # no operand outlives its GEMM
            if for_input:
                grad_input = _grad_input(ctx, q, g, weight)
                grad_input = grad_input.reshape(*grad_output.shape[:-1], weight.shape[1])
            if for_weight:
                input = _wgrad_input(ctx, q, saved, g.dtype)
                grad_weight = q.matmul(q("wgrad_grad_output", g).T, input, g.dtype)
        grad_bias = g.sum(0) if for_bias else None
        return grad_input, grad_weight, grad_bias, None, None


def _grad_input(ctx: Any, q: Any, g: Tensor, weight: Tensor) -> Any:
    """dgrad's product; of unquantized operands in PyTorch's order for such an input."""
    left, right = q("dgrad_grad_output", g), q("dgrad_weight", weight)
    if ctx.by_columns and not ctx.q.numerics.recipe.quantizes("dgrad"):
        return q.matmul(right.T, left.T, g.dtype).t()
    return q.matmul(left, right, g.dtype)


def _wgrad_input(ctx: Any, q: Any, saved: list[Any], dtype: torch.dtype) -> Any:
    """wgrad's second operand: of the input, or what was saved in its place."""
    if ctx.replaced:
        if isinstance(q, StraightOperands) and ctx.needs_input_grad[0]:
            raise RuntimeError(
                "a second backward needs the layer's input, which Reuse and Keep(quantized_inputs) "
                "do not hold: compute this forward without them"
            )
        return q.restored_input(saved, ctx.kind, dtype)
    return q("wgrad_input", _matrix(saved[0]))


def _lies_by_columns(x: Tensor) -> bool:
    return x.stride(0) == 1 and x.stride(1) == len(x)


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    """Operands held in FP32, and rotations, stay so."""
    if torch.compiler.is_compiling() or _autocast_dtype(device) is not None:
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _autocast_dtype(device: str) -> torch.dtype | None:
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


class QuantLinear(nn.Linear):
    """`nn.Linear` under a recipe; the same parameters, state_dict keys, shapes and dtypes.

    Input [..., in_features]. Under autocast, input, weight and bias are cast as `nn.Linear`'s are,
    and quantized as the GEMM would have received them. docs/layer.md says which uses are right.
    """

    recipe: QuantRecipe = QuantRecipe()
    backend: Backend = Emulate()
    randomness: Randomness | None = None  #: for stochastic rounding
    index: int = 0  #: of the layer in the model: its stream of random numbers
    keep: Keep = Keep()
    changes: bool = False  #: whether the recipe ever has
    told: str = repr(QuantRecipe())  #: the recipe, as a compiled graph can hold it

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
        """A quantized layer that shares `linear`'s parameters, hooks and attributes.

        ValueError for a layer that computes something else than `nn.Linear` does.
        """
        check_convertible(linear)
        layer = cls.__new__(cls)
        own = {"_parameters", "_buffers", "_modules"}  # not the dictionaries, what is in them
        layer.__dict__.update({k: dict(v) if k in own else v for k, v in vars(linear).items()})
        layer.backend, layer.randomness, layer.index = backend or Emulate(), randomness, index
        layer.keep = keep or Keep()
        layer.set_recipe(recipe)
        layer.changes = False
        return layer

    def set_recipe(self, recipe: QuantRecipe) -> None:
        """Compute under `recipe` from now on; ValueError if a block does not divide the layer.

        A backward pass, and what it computes again, stay under the recipe of their forward.
        """
        _check_widths(recipe, self.in_features, self.out_features)
        if recipe.is_random and self.randomness is None:
            what = "signs of each step need" if recipe.redraws else "stochastic rounding needs"
            raise ValueError(f"{what} randomness=Randomness(seed)")
        self.changes = self.changes or recipe != self.recipe
        self.recipe, self.told = recipe, repr(recipe)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        numerics = self.numerics()
        if not torch.compiler.is_compiling():
            numerics = as_at_first(self, numerics, self.changes or self.recipe.is_random)
        elif not torch.compiler.is_exporting():
            numerics, input = as_at_first_in_graph(self, numerics, input)
        if numerics.recipe.is_baseline:
            return super().forward(input)
        check_input(self, input)
        device = input.device.type
        dtype = _autocast_dtype(device)
        cast, weight, bias = (_cast(x, dtype) for x in (input, self.weight, self.bias))
        assert cast is not None and weight is not None
        check_dtypes(cast, weight)
        q, owned = self._operands(numerics, input, cast, weight)
        with _without_autocast(device):
            output: Tensor = _QuantizedLinear.apply(cast, weight, bias, q, owned)  # type: ignore[no-untyped-call]  # torch's
        return output

    def numerics(self) -> LayerNumerics:
        """How it computes now."""
        key = self.randomness.key(self.index) if self.recipe.is_random and self.randomness else None
        reuse, way = reused_now(), bf16.products()
        recipe = self.recipe
        if recipe.redraws and self.randomness:
            if torch.compiler.is_compiling():
                raise ValueError("a compiled layer cannot draw the signs of each step: seed=step")
            recipe = recipe.with_signs(self.randomness.signs())
        return LayerNumerics(recipe, self.backend, key, self.keep, reuse, way)

    def _operands(
        self, numerics: LayerNumerics, input: Tensor, cast: Tensor, weight: Tensor
    ) -> tuple[Operands, bool]:
        """Those of this call, and whether it owns the cast of its input."""
        reuse = numerics.reuse
        if reuse is None:
            return Operands(numerics), False
        weights = None
        if numerics.keep.quantized_weights:
            drawn = None if numerics.key is None else int(numerics.key.state)
            kind = weight.dtype, numerics.recipe, numerics.backend, drawn
            weights = reuse.of_weight(self, self.weight, *kind)
        return Operands(numerics, reuse.of_input(input, cast.dtype), weights), cast is not input

    def extra_repr(self) -> str:
        """The recipe beside the shape."""
        table = ", ".join(f"{operand}={text}" for operand, text in self.recipe.table().items())
        return f"{super().extra_repr()}, {table}"


def _cast(x: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """As autocast does for a GEMM, which leaves FP64 alone."""
    if x is None or dtype is None or x.dtype is torch.float64 or not x.is_floating_point():
        return x
    return x.to(dtype)


def check_convertible(linear: nn.Linear) -> None:
    """ValueError for a layer that `QuantLinear` does not compute as `nn.Linear` under a recipe."""
    kind = type(linear)
    if isinstance(linear, nn.LazyLinear):
        raise ValueError("LazyLinear has no shape yet: run a batch through the model first")
    if hasattr(linear, "parametrizations"):
        raise ValueError("its weight is parametrized: remove that first (remove_parametrizations)")
    if kind is not nn.Linear and not issubclass(kind, QuantLinear):
        raise ValueError(f"{kind.__name__} is not nn.Linear and may compute otherwise: skip it")
    if not isinstance(linear._parameters.get("weight"), nn.Parameter):
        raise ValueError("its weight is computed, by pruning or weight_norm: remove that first")
    if linear._compiled_call_impl is not None or "forward" in vars(linear):
        raise ValueError("its forward was compiled or replaced: convert before")


def _check_widths(recipe: QuantRecipe, in_features: int, out_features: int) -> None:
    """Feature widths must be whole blocks; tokens need not be, they are filled with zeros."""
    axes = {"fprop": ("in_features", in_features), "dgrad": ("out_features", out_features)}
    for operand in OPERANDS[:4]:
        gemm = ROLES[operand].gemm
        axis, width = axes[gemm]
        sizes: dict[str, int] = {}
        format, rotation = recipe.format(operand), recipe.rotation(gemm)
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
