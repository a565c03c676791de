"""compressed-tensors' `transform_config`: what its readers turn inputs and weights by."""

from typing import Any

from torch import Tensor

from lowbit.definition.transforms import Transform
from train.quantized.model import QuantizedModel


def transforms(model: QuantizedModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`transform_config`, and the matrices of those that are none of its own."""
    groups: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for number, transform in enumerate(model.transforms):
        names = [n for n, layer in model.layers.items() if layer.transform == transform]
        own = is_own(transform)
        groups[f"T{number}"] = {
            "type": "hadamard" if own else "random-matrix",
            "head_dim": transform.size,
            "apply": [
                {"targets": names, "location": "weight_input", "inverse": True},
                {"targets": names, "location": "input"},
            ],
        }
        if not own:
            stored = {f"{n}.T{number}_input.weight": transform.matrix().clone() for n in names}
            tensors |= stored
    return {"config_groups": groups}, tensors


def is_own(transform: Transform) -> bool:
    """Whether it is compressed-tensors' `hadamard`."""
    return transform.name == "hadamard" and transform.seed is None
