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
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import BlockFormat, OuterScale, QuantizedTensor, ScaleFormat, Transform
from train.checkpoints.folder import open_staging, publish
from train.config.formats import read_format, write_format
from train.quantized.linear import StoredLinear
from train.quantized.tensors import Entry, write_bytes, write_tensors

FORMAT_VERSION = 1
DOCUMENT = "quantization.json"
PARTS = ("codes", "scale", "tensor_scale", "transform")
FILES = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab.*|merges\.txt|.+\.model"
    r"|chat_template\..+|generation_config\.json"
)


def check_stored(format: BlockFormat) -> None:
    """ValueError for a format of weights that no file holds."""
    if format.outer is OuterScale.ROW:
        raise ValueError(f"{format}: a file holds one scale above a weight's blocks, none by row")


@dataclass(frozen=True)
class StoredLayer:
    """A linear layer's weight [out, in] as it is stored, and what its input goes through."""

    weight: QuantizedTensor  #: of W M⁻ᵀ where there is a transform
    activations: BlockFormat | None = None
    transform: Transform | None = None
    input_amax: float | None = None  #: largest magnitude of its (transformed) input in calibration

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


def stored_layer(name: str, said: Mapping[str, Any], held: Mapping[str, Tensor]) -> StoredLayer:
    """The layer called `name`, of which quantization.json says this, from tensors by full name."""
    found = {part: held.get(f"{name}.weight.{part}") for part in PARTS}
    codes, scale = found["codes"], found["scale"]
    assert codes is not None and scale is not None
    if scale.dtype is torch.float8_e4m3fn:
        scale = scale.view(torch.uint8)
    turned = said["transform"]
    return StoredLayer(
        QuantizedTensor(codes, scale, found["tensor_scale"], read_format(said["format"]), -1),
        None if said["activations"] is None else read_format(said["activations"]),
        turned and Transform(**turned, given=found["transform"]),
        said.get("input_amax"),
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
