"""What a layout makes of a quantized model."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from train.quantized.layout import StoredLayer
from train.quantized.module import turned
from train.quantized.tensors import Entry


def plain_weight(layer: StoredLayer, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """What a layer without a transform needs: W' Mᵀ, in FP32 and rounded once."""
    if layer.transform is None:
        return layer.weight.dequantize(dtype)
    return turned(layer.weight.dequantize(), layer.transform.matrix().T).to(dtype)


@dataclass(frozen=True)
class Packed:
    """What a layout makes of a model."""

    tensors: dict[str, Tensor]  #: of the safetensors file
    config: dict[str, Any] = field(default_factory=dict)  #: more keys of config.json
    notes: tuple[str, ...] = ()  #: what a user has to know, one line each
    documents: dict[str, Any] = field(default_factory=dict)  #: further JSON files, by name
    entries: tuple[Entry, ...] = ()  #: of the safetensors file, beside `tensors`
