"""Our own layout of a quantized model, `lowbit`: any of our formats, nothing lost.

    config.json, tokenizer*, generation_config.json   of the model that was quantized
    quantization.json   what was done, and how each layer is stored
    model.safetensors   a layer L: L.weight.codes, .scale, .tensor_scale, .transform; others as were
    manifest.json       SHA-256 of all of them

Codes take a byte a value, [out, in]: int8, or bit patterns of floats as uint8. Scales, [out, blocks
along in]: biased exponents (uint8) of E8M0, float8_e4m3fn of E4M3, else their values. Weights are
stored as their transform left them: W M⁻ᵀ, for inputs x M.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lowbit import BlockFormat, QuantizedTensor, ScaleFormat, Transform
from train.checkpoints.folder import open_staging, publish, verify_checkpoint
from train.config.formats import read_format, write_format
from train.quantized.linear import StoredLinear
from train.quantized.on_meta import parameters_on_meta
from train.quantized.tensors import Entry, write_bytes, write_tensors

FORMAT_VERSION = 1
DOCUMENT = "quantization.json"
_PARTS = ("codes", "scale", "tensor_scale", "transform")


@dataclass(frozen=True)
class StoredLayer:
    """A linear layer's weight [out, in] as it is stored, and what its input goes through."""

    weight: QuantizedTensor  #: of W M⁻ᵀ where there is a transform
    activations: BlockFormat | None = None
    transform: Transform | None = None

    def entries(self, name: str) -> Iterator[Entry]:
        """Its tensors, for the layer called `name`."""
        scale, above = self.weight.scale, self.weight.tensor_scale
        if self.weight.format.scale == ScaleFormat.E4M3:
            scale = scale.view(torch.float8_e4m3fn)
        yield Entry.of(f"{name}.weight.codes", self.weight.codes)
        yield Entry.of(f"{name}.weight.scale", scale)
        if above is not None:
            yield Entry.of(f"{name}.weight.tensor_scale", above.float().reshape(()))
        if self.transform is not None and self.transform.is_stored:
            yield Entry.of(f"{name}.weight.transform", self.transform.matrix())

    def describe(self) -> dict[str, Any]:
        """What `layers` of quantization.json holds of it."""
        turned = self.transform
        return {
            "format": write_format(self.weight.format),
            "activations": None if self.activations is None else write_format(self.activations),
            "transform": turned and {"name": turned.name, "size": turned.size, "seed": turned.seed},
        }

    def module(self, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The layer that computes with it."""
        return StoredLinear(self.weight.dequantize(dtype), bias, self.activations, self.transform)


class StoredModel:
    """What `lowbit quantize` left in a folder; ValueError for another, or a damaged, one."""

    def __init__(self, folder: Path) -> None:
        if not is_ours(folder):
            raise ValueError(f"{folder} holds no {DOCUMENT}: it is not what `lowbit quantize` left")
        verify_checkpoint(folder)
        self.folder = folder
        self.document: dict[str, Any] = json.loads((folder / DOCUMENT).read_text())
        if self.document["format_version"] != FORMAT_VERSION:
            version = self.document["format_version"]
            raise ValueError(f"{folder} has format version {version}, expected {FORMAT_VERSION}")

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the quantized layers."""
        return tuple(self.document["layers"])

    def layer(self, name: str) -> StoredLayer:
        """The one called `name`."""
        keys = [f"{name}.weight.{part}" for part in _PARTS]
        held = {key: self.tensor(key) for key in keys if key in self._files}
        return stored_layer(name, self.document["layers"][name], held)

    def others(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of every tensor that was left as it is, biases included."""
        ours = {f"{name}.weight.{part}" for name in self.layers for part in _PARTS}
        for name in sorted(self._files.keys() - ours):
            yield name, self.tensor(name)

    def tensor(self, name: str) -> Tensor:
        """As stored."""
        with safe_open(self._files[name], framework="pt") as file:
            found: Tensor = file.get_tensor(name)
            return found

    @cached_property
    def _files(self) -> dict[str, Path]:
        found = dict[str, Path]()
        for path in sorted(self.folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        return found

    def load(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A transformers model in eval mode whose quantized layers compute as stored: inputs
        through the transform and the format of activations, weights dequantized.
        """
        config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        with parameters_on_meta():
            make: Any = AutoModelForCausalLM.from_config
            model: Any = make(config, dtype=dtype)
        others = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in self.others()
        }
        for name in self.layers:
            parent, _, child = name.rpartition(".")
            module = self.layer(name).module(others.pop(f"{name}.bias", None), dtype)
            setattr(model.get_submodule(parent), child, module)
        unknown = model.load_state_dict(others, strict=False, assign=True).unexpected_keys
        model.tie_weights()
        missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if unknown or missing:
            wrong = f"lacks {missing[0]}" if missing else f"has no place for {unknown[0]}"
            raise ValueError(f"{self.folder}: the model of its config.json {wrong}")
        loaded: nn.Module = model.eval()
        return loaded


def stored_layer(name: str, said: Mapping[str, Any], held: Mapping[str, Tensor]) -> StoredLayer:
    """The layer called `name`, of which quantization.json says this, from tensors by full name."""
    found = {part: held.get(f"{name}.weight.{part}") for part in _PARTS}
    codes, scale = found["codes"], found["scale"]
    assert codes is not None and scale is not None
    if scale.dtype is torch.float8_e4m3fn:
        scale = scale.view(torch.uint8)
    turned = said["transform"]
    return StoredLayer(
        QuantizedTensor(codes, scale, found["tensor_scale"], read_format(said["format"]), -1),
        None if said["activations"] is None else read_format(said["activations"]),
        turned and Transform(**turned, given=found["transform"]),
    )


def is_ours(folder: Path) -> bool:
    """Whether it carries the mark of `lowbit quantize`."""
    return (folder / DOCUMENT).is_file()


def write(
    target: Path, entries: Iterator[Entry], document: Mapping[str, Any], files: Mapping[str, bytes]
) -> None:
    """Leave a quantized model in `target` (new, or empty), whole or not at all: the tensors, the
    `files` of its model by name, and quantization.json, of which the format version is added.
    """
    staging = open_staging(target.with_name(f".{target.name}.lowbit-quantize"))
    digests = write_tensors(staging, entries)
    text = json.dumps({"format_version": FORMAT_VERSION, **document}, indent=1) + "\n"
    for name, data in {**files, DOCUMENT: text.encode()}.items():
        digests[name] = write_bytes(staging / name, data)
    publish(staging, target, digests, {"source": document.get("source")})
