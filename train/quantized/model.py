"""A quantized model: linear layers as codes and scales, beside the tensors that stay."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lowbit import BlockFormat, Transform
from train.checkpoints.folder import verify_checkpoint
from train.quantized.layout import (
    DOCUMENT,
    FILES,
    FORMAT_VERSION,
    PARTS,
    StoredLayer,
    is_ours,
    stored_layer,
)
from train.quantized.on_meta import parameters_on_meta

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that engines multiply as one, under one tensor scale."""


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


def read_quantized(folder: Path) -> QuantizedModel:
    """What `lowbit quantize` left in a folder; ValueError for another, or a damaged, one."""
    if not is_ours(folder):
        raise ValueError(f"{folder} holds no {DOCUMENT}: it is not what `lowbit quantize` left")
    verify_checkpoint(folder)
    document: dict[str, Any] = json.loads((folder / DOCUMENT).read_text())
    if (version := document["format_version"]) != FORMAT_VERSION:
        raise ValueError(f"{folder} has format version {version}, expected {FORMAT_VERSION}")
    held = dict[str, Tensor]()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            held |= {name: file.get_tensor(name) for name in file.keys()}
    layers = dict[str, StoredLayer]()
    for name, said in document["layers"].items():
        own = {key: held.pop(key, None) for part in PARTS if (key := f"{name}.weight.{part}")}
        found = {key: tensor for key, tensor in own.items() if tensor is not None}
        layers[name] = stored_layer(name, said, found)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with parameters_on_meta():
        make: Any = AutoModelForCausalLM.from_config
        empty = make(config)
    source = document.get("source") or str(folder)
    return QuantizedModel(
        source=str(source["model"] if isinstance(source, dict) and "model" in source else source),
        config=plain_config(empty),
        layers=layers,
        others=held,
        kept=tuple(name for name in linear_names(empty) if name not in layers),
        files=small_files(folder),
        method=document.get("method") or {},
    )


def plain_config(model: nn.Module) -> dict[str, Any]:
    """config.json of a BF16 model of this architecture."""
    config: Any = model.config
    plain = json.loads(config.to_json_string(use_diff=False))
    plain |= {"dtype": "bfloat16", "architectures": [type(model).__name__], "use_cache": True}
    for name in ("_name_or_path", "quantization_config"):
        plain.pop(name, None)
    return dict(plain)


def linear_names(model: nn.Module) -> list[str]:
    """Of all linear layers."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def small_files(folder: Path) -> dict[str, bytes]:
    """Tokenizer, chat template and generation settings that lie in a folder."""
    found = [path for path in sorted(folder.iterdir()) if path.is_file()]
    return {path.name: path.read_bytes() for path in found if FILES.fullmatch(path.name)}
