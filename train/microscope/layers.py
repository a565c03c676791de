"""The linear layers that a glob names, and where each is in the model."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn


def place_of(layer: str) -> dict[str, Any]:
    """Where a layer is in the model, by its name; depth -1 without a number."""
    number = re.search(r"\d+", layer)
    depth = int(number[0]) if number else -1
    return {"layer": layer, "type": layer.rpartition(".")[2], "depth": depth}


def chosen_linears(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers that a glob names; ValueError for one that names none."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise ValueError(f"{pattern!r} matches no linear layer of {list(layers)}")
    return {n: m for n, m in layers.items() if any(fnmatchcase(n, p) for p in patterns)}
