"""Which products a model's quantized layers really compute: counted where a backend gets them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.backend import Backend, Operand, Wanted
from lowbit.definition.noise import Key
from lowbit.formats import BlockFormat
from lowbit.linear import QuantLinear
from lowbit.quantize import QuantizedTensor
from lowbit.recipe import GEMMS, QuantRecipe

Product = tuple[str, str, str]  #: GEMM, and the format of each operand, `bf16` as it is
_GEMM = {(1, 0): "dgrad", (0, 0): "wgrad"}  # by the axes of the blocks


class Counting:
    """Within, the products of each `QuantLinear` of a model, by name. Not of compiled layers."""

    def __init__(self, model: nn.Module) -> None:
        modules = model.named_modules()
        self._layers = {n: m for n, m in modules if isinstance(m, QuantLinear)}
        self._made: dict[int, _Made] = {}
        self.products: dict[str, Counter[Product]] = {name: Counter() for name in self._layers}

    def __enter__(self) -> "Counting":
        for name, layer in self._layers.items():
            layer.backend = _Recording(layer.backend, self._made, self.products[name])
        return self

    def __exit__(self, *_: object) -> None:
        for layer in self._layers.values():
            if isinstance(layer.backend, _Recording):
                layer.backend = layer.backend.inner
        self._made.clear()

    def differences(self, recipes: Mapping[str, QuantRecipe | None]) -> list[str]:
        """What these layers should have computed under `recipes` and did not, a line each."""
        found = []
        for name, recipe in recipes.items():
            for gemm, pair in GEMMS.items() if recipe else ():
                assert recipe is not None
                formats = (recipe.format(recipe.role(operand).name) for operand in pair)
                wanted = {(gemm, *(str(format or "bf16") for format in formats))}
                ran = {p for p in self.products.get(name, ()) if p[0] == gemm}
                plain = all(p[1:] == ("bf16", "bf16") for p in ran)
                if ran != wanted and (recipe.quantizes(gemm) or not plain):
                    texts = [" x ".join(p[1:]) for p in sorted(ran)] or ["nothing"]
                    expected = " x ".join(next(iter(wanted))[1:])
                    found.append(f"{name}: {gemm} ran {', '.join(texts)}, not {expected}")
        return found


def census(model: nn.Module, batch: Any) -> dict[str, dict[Product, int]]:
    """The products of one forward and backward over `batch`, by layer; (GEMM, formats) -> count.

    `batch` is what the model is called with: a mapping of keywords, a tuple, or one tensor. The
    result's `loss` is differentiated, else the sum of its first tensor. Gradients and random
    numbers are as they were afterwards. A converted layer that was never called has no products.
    """
    parameters = list(model.parameters())
    before = [p.grad for p in parameters]
    try:
        for p in parameters:
            p.grad = None
        with torch.random.fork_rng(), Counting(model) as counting:
            _scalar(_called(model, batch)).backward()  # type: ignore[no-untyped-call]  # torch's
    finally:
        for p, grad in zip(parameters, before, strict=True):
            p.grad = grad
    return {name: dict(found) for name, found in counting.products.items()}


def _called(model: nn.Module, batch: Any) -> Any:
    match batch:
        case Mapping():
            return model(**batch)
        case tuple():
            return model(*batch)
    return model(batch)


def _scalar(output: Any) -> Tensor:
    if isinstance(loss := getattr(output, "loss", None), Tensor):
        return loss
    first = output if isinstance(output, Tensor) else next(iter(_values(output)))
    assert isinstance(first, Tensor)
    return first.float().sum()


def _values(output: Any) -> Any:
    return output.values() if isinstance(output, Mapping) else output


@dataclass(frozen=True)
class _Made:
    """An operand as it was made."""

    dim: int
    format: str
    stride: tuple[int, ...]


class _Recording:
    """A backend that notes what it is asked for; equal for layers that share one."""

    def __init__(
        self, inner: Backend, made: dict[int, _Made], products: "Counter[Product]"
    ) -> None:
        self.inner, self.made, self.products = inner, made, products
        self.name = inner.name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Recording) and self.inner is other.inner

    def __hash__(self) -> int:
        return hash(id(self.inner))

    def _note(self, operand: Operand, format: BlockFormat | None, dim: int) -> Operand:
        values = operand.values
        note = _Made(dim, str(format or "bf16"), values.stride())
        self.made[values.untyped_storage()._cdata] = note
        return operand

    def operand(self, x: Tensor, format: BlockFormat | None, dim: int, key: Key | None) -> Operand:
        return self._note(self.inner.operand(x, format, dim, key), format, dim)

    def operands(self, x: Tensor, across: Wanted, down: Wanted) -> tuple[Operand, Operand]:
        first, second = self.inner.operands(x, across, down)
        return self._note(first, across[0], 1), self._note(second, down[0], 0)

    def stored(self, x: Tensor, format: BlockFormat, dim: int, key: Key | None) -> QuantizedTensor:
        return self.inner.stored(x, format, dim, key)

    def restored(self, stored: QuantizedTensor, dtype: torch.dtype) -> Operand:
        return self._note(self.inner.restored(stored, dtype), stored.format, stored.dim)

    def matmul(self, a: Operand, b: Operand, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        left, right = (self.made[x.values.untyped_storage()._cdata] for x in (a, b))
        turned = getattr(b, "blocked_dim", None) == 0 or b.values.stride() != right.stride
        gemm = _GEMM.get((left.dim, right.dim)) or ("fprop" if turned else "dgrad")
        self.products[gemm, left.format, right.format] += 1
        return self.inner.matmul(a, b, bias, dtype)
