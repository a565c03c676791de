"""The linear layers that a glob names, where each is in the model, and what else holds weights."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeGuard

from torch import nn

from lowbit import QuantLinear


def place_of(layer: str) -> dict[str, Any]:
    """Where a layer is in the model, by its name; depth -1 without a number."""
    number = re.search(r"\d+", layer)
    depth = int(number[0]) if number else -1
    return {"layer": layer, "type": layer.rpartition(".")[2], "depth": depth}


def chosen_linears(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers that a glob names; ValueError for one that names none."""
    layers = {n: m for n, m in model.named_modules() if _multiplies_plainly(m)}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in layers):
            others = other_weights(model, layers.values())
            beside = f"; formats go onto nn.Linear alone, not onto {others}" if others else ""
            raise ValueError(f"{pattern!r} matches no linear layer of {list(layers)}{beside}")
    return {n: m for n, m in layers.items() if any(fnmatchcase(n, p) for p in patterns)}


def _multiplies_plainly(module: nn.Module) -> TypeGuard[nn.Linear]:
    """A linear layer of ours or of torch; not a router that computes more, and returns more."""
    plain = getattr(type(module), "forward", None) is nn.Linear.forward
    return isinstance(module, nn.Linear) and (plain or isinstance(module, QuantLinear))


def other_weights(model: nn.Module, layers: Iterable[nn.Module]) -> str | None:
    """In words: what multiplies by weights and is none of `layers`; None if nothing does.

    Linear layers that were left alone, GPT-2's Conv1D, experts held as one parameter of three
    dimensions; not vectors (norms, biases), nor what is looked up, a head tied to it included.
    """
    known = {id(layer.weight) for layer in layers}
    known |= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    kinds: Counter[str] = Counter()
    sizes: dict[int, int] = {}
    for module in model.modules():
        own = {id(p): p.numel() for p in module.parameters(recurse=False) if p.ndim > 1}
        own = {key: size for key, size in own.items() if key not in known}
        kinds[type(module).__name__] += bool(own)
        sizes |= own
    total = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    named = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    return f"{named}: {sum(sizes.values()):,} of {total:,} weights" if named else None
