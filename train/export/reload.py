"""Exports read back: by stock readers where they run on a CPU, by ours where none does."""

import contextlib
import importlib.metadata
import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from lowbit.definition.rotation import hadamard
from train.checkpoints.folder import verify_checkpoint
from train.export import compressed_tensors, fp_quant, gguf, mxfp8, plain
from train.export.folder import read_mark
from train.export.model import plain_weight
from train.quantized.model import QuantizedModel, read_quantized
from train.quantized.module import as_module, before, empty, filled
from train.subjects.gguf import read_gguf
from train.subjects.gguf_llama import llama_of

GGUF_FILE = "model.gguf"
TOKENS = 64
_NEEDS = {compressed_tensors.NAME: "compressed-tensors", mxfp8.NAME: "accelerate"}


@dataclass(frozen=True)
class Reloaded:
    """An export as its reader has it."""

    model: nn.Module
    reader: str  #: with versions, for a person


def reload(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Reloaded:
    """The model in an export's folder; ValueError where its reader is not installed."""
    mark = read_mark(folder)
    if mark is None:
        raise ValueError(f"{folder} is no export of ours: no manifest.json in it names a layout")
    verify_checkpoint(folder)
    layout = mark["layout"]
    needed = _NEEDS.get(layout)
    if needed and _version(needed) is None:
        raise ValueError(f"{folder}: reading {layout} needs the package {needed}: pip install it")
    stock = f"transformers {_version('transformers')}"
    match layout:
        case plain.NAME | mxfp8.NAME:
            return Reloaded(_pretrained(folder, dtype), stock)
        case compressed_tensors.NAME:
            model, turns = _pretrained(folder, dtype), _turn(folder)
            for name, matrix in turns.items():
                before(model.get_submodule(name), matrix)
            reader = f"{stock} with compressed-tensors {_version(needed or '')}"
            return Reloaded(model, f"{reader}, transforms by lowbit" if turns else reader)
        case gguf.NAME if _version("gguf") is not None:
            model = _pretrained(folder, dtype, gguf_file=GGUF_FILE)
            return Reloaded(model, f"{stock} with gguf {_version('gguf')}")
        case gguf.NAME:
            own: nn.Module = llama_of(read_gguf(folder / GGUF_FILE))
            return Reloaded(own.to(dtype), "lowbit's reader")
        case fp_quant.NAME:
            return Reloaded(_fp_quant(folder, dtype), "lowbit, which leaves activations unrounded")
        case "lowbit":
            return Reloaded(as_module(read_quantized(folder), dtype, exported=False), "lowbit")
    raise ValueError(f"{folder}: unknown layout {layout!r}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pretrained(folder: Path, dtype: torch.dtype, **more: Any) -> nn.Module:
    disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers'
    with _quiet(), torch.no_grad():
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, **more
        )
        model.train(False)
        model(torch.zeros(1, 1, dtype=torch.int64))  # compressed weights unpack at the first call
    loaded: nn.Module = model
    return loaded


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers warns of the transforms' tensors, compressed-tensors shows four bars."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder's safetensors files."""
    return {
        k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()
    }


def _config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def _turn(folder: Path) -> dict[str, Tensor]:
    """What transformers ignores: the matrix that each rotated layer's input is multiplied by."""
    transforms = _config(folder)["quantization_config"].get("transform_config")
    if not transforms:
        return {}
    tensors, found = read_tensors(folder), {}
    for group, scheme in transforms["config_groups"].items():
        for name in scheme["apply"][-1]["targets"]:
            stored = tensors.get(f"{name}.{group}_input.weight")
            found[name] = hadamard(scheme["head_dim"]) if stored is None else stored
    return found


def _fp_quant(folder: Path, dtype: torch.dtype) -> nn.Module:
    config, tensors = _config(folder), read_tensors(folder)
    state = fp_quant.read(tensors, config["quantization_config"])
    model = filled(empty(config, dtype), {name: t.to(dtype) for name, t in state.items()})
    for name, matrix in tensors.items():
        stem, _, kind = name.rpartition(".")
        if kind == "forward_hadamard_matrix" and not torch.equal(matrix, torch.eye(len(matrix))):
            before(model.get_submodule(stem), matrix.float())
    return model


@torch.no_grad()
def compare(folder: Path, model: QuantizedModel) -> str:
    """A line on the export in `folder` beside the model it was made of, reader named.

    ValueError if a weight is another than ours.
    """
    dtype = torch.float32 if (folder / GGUF_FILE).exists() else torch.bfloat16
    found = reload(folder, dtype)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config["vocab_size"], (1, TOKENS), generator=generator)
    theirs = _log_probabilities(found.model, tokens)
    undone = (read_mark(folder) or {})["layout"] == plain.NAME
    for name, layer in model.layers.items():
        ours = plain_weight(layer, dtype) if undone else layer.weight.dequantize(dtype)
        weight: Any = found.model.get_submodule(name).weight
        if count := int((weight.to(dtype) != ours).sum()):
            raise ValueError(f"{found.reader} reads {count} other values in {name} than we wrote")
    moved = (theirs - _log_probabilities(as_module(model, dtype), tokens)).abs()
    kind = str(dtype).removeprefix("torch.")
    return (
        f"reloaded by {found.reader}: {len(model.layers)} weights equal the {kind} of ours; "
        f"log-probabilities of {TOKENS} tokens {float(moved.mean()):.2g} apart on average, "
        f"{float(moved.max()):.2g} at most"
    )


def _log_probabilities(model: nn.Module, tokens: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits.float().log_softmax(-1)
