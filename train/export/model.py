"""What is exported: linear layers as codes and scales, beside the tensors that stay as they are."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowbit import BlockFormat
from lowbit.definition.blocks import from_blocks, to_blocks
from lowbit.definition.transforms import Transform
from train.quantized.layout import StoredLayer
from train.quantized.tensors import Entry

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that engines multiply as one, under one tensor scale."""


def plain_weight(layer: StoredLayer, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """What a layer without a transform needs: W' Mᵀ, in FP32 and rounded once."""
    if layer.transform is None:
        return layer.weight.dequantize(dtype)
    return turned(layer.weight.dequantize(), layer.transform.matrix().T).to(dtype)


def turned(x: Tensor, matrix: Tensor) -> Tensor:
    """`x` times `matrix` in FP32, on each run of its size along the last axis."""
    blocks, inside = to_blocks(x.float(), len(matrix), -1)
    return from_blocks(blocks @ matrix.to(x.device), inside, tuple(x.shape))


@dataclass(frozen=True)
class QuantizedModel:
    """A causal language model of which some linear layers are quantized."""

    source: str  #: what it was read from, for a person
    config: Mapping[str, Any]  #: config.json
    layers: Mapping[str, StoredLayer]  #: by the module's name
    others: Mapping[str, Tensor]  #: every other tensor, by its Hugging Face name
    kept: tuple[str, ...] = ("lm_head",)  #: linear layers that are not quantized
    files: Mapping[str, bytes] = field(default_factory=dict)  #: tokenizer, templates, settings
    method: Mapping[str, Any] = field(default_factory=dict)  #: how it was made, for the card

    @property
    def formats(self) -> list[BlockFormat]:
        """Of the weights, each once, in the layers' order."""
        return list(dict.fromkeys(layer.weight.format for layer in self.layers.values()))

    @property
    def transforms(self) -> list[Transform]:
        """Each once."""
        found = (layer.transform for layer in self.layers.values())
        return list(dict.fromkeys(transform for transform in found if transform is not None))

    def stay(self, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
        """The other tensors in `dtype`, without a head that is the embedding again."""
        tied = self.config.get("tie_word_embeddings")
        return {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in self.others.items()
            if not (tied and name == "lm_head.weight")
        }

    def parted(self) -> list[tuple[str, ...]]:
        """Groups of layers that an engine fuses, though their tensor scales differ."""
        return [group for group in fused(self.layers) if len(self._tensor_scales(group)) > 1]

    def _tensor_scales(self, group: tuple[str, ...]) -> set[float]:
        scales = (self.layers[name].weight.tensor_scale for name in group)
        return {float(scale) for scale in scales if scale is not None}


def fused(names: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The layers of `names` that engines multiply as one, group by group."""
    groups = []
    for name in names:
        stem, _, last = name.rpartition(".")
        for parts in FUSED:
            if last == parts[0]:
                groups.append(tuple(f for p in parts if (f := f"{stem}.{p}") in names))
    return groups


@dataclass(frozen=True)
class Packed:
    """What a layout makes of a model."""

    tensors: dict[str, Tensor]  #: of the safetensors file
    config: dict[str, Any] = field(default_factory=dict)  #: more keys of config.json
    notes: tuple[str, ...] = ()  #: what a user has to know, one line each
    documents: dict[str, Any] = field(default_factory=dict)  #: further JSON files, by name
    entries: tuple[Entry, ...] = ()  #: of the safetensors file, beside `tensors`
