"""The layouts by name: what each holds, and how a model is written as one."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from train.export import compressed_tensors, fp_quant, gguf, mxfp8, own, plain
from train.export.gguf_file import read_tokens, write
from train.export.model import Packed
from train.export.reload import GGUF_FILE
from train.quantized.layout import StoredLayer
from train.quantized.model import QuantizedModel
from train.quantized.tensors import Entry, write_bytes, write_tensors

Pack = Callable[[QuantizedModel], Packed]


@dataclass(frozen=True)
class Layout:
    """One target."""

    name: str
    holds: str  #: in words
    refuse: Callable[[StoredLayer], str | None]
    pack: Pack | None  #: None for a GGUF, which is one file
    refuse_model: Callable[[QuantizedModel], str | None] = lambda model: None
    fuses: bool = False  #: whether its engines multiply q, k, v (and gate, up) as one


_ALL = (
    Layout(compressed_tensors.NAME, compressed_tensors.HOLDS, compressed_tensors.refuse,
           compressed_tensors.pack, fuses=True),
    Layout(fp_quant.NAME, fp_quant.HOLDS, fp_quant.refuse, fp_quant.pack,
           fp_quant.refuse_mixture, fuses=True),
    Layout(gguf.NAME, gguf.HOLDS, gguf.refuse, None, gguf.refuse_model),
    Layout(mxfp8.NAME, mxfp8.HOLDS, mxfp8.refuse, mxfp8.pack),
    Layout(plain.NAME, plain.HOLDS, plain.refuse, plain.pack),
    Layout(own.NAME, own.HOLDS, plain.refuse, own.pack),
)  # fmt: skip
LAYOUTS = {layout.name: layout for layout in _ALL}


def refusal(model: QuantizedModel, layout: Layout) -> str | None:
    """Why the layout cannot hold the model: the first layer's reason, or the whole's."""
    for name, layer in model.layers.items():
        if reason := layout.refuse(layer):
            return f"{name}: {reason}"
    return layout.refuse_model(model)


def check_holds(model: QuantizedModel, layout: Layout) -> None:
    """ValueError, naming the layouts that can, unless `layout` can hold the model."""
    if (reason := refusal(model, layout)) is None:
        return
    able = [other.name for other in _ALL if refusal(model, other) is None]
    raise ValueError(f"{layout.name} cannot hold {reason}. These can: {', '.join(able)}")


def write_model(
    model: QuantizedModel, layout: Layout, folder: Path, *, pseudo: bool
) -> tuple[dict[str, str], list[str]]:
    """Fill an empty folder: SHA-256 by file, and what a user has to know, line by line."""
    digests = {name: write_bytes(folder / name, data) for name, data in model.files.items()}
    if layout.pack is None:
        tokens = read_tokens(model.files)
        stored = gguf.pack(model)
        digests[GGUF_FILE] = write(folder / GGUF_FILE, gguf.metadata(model, tokens), stored)
        return digests, gguf.notes(tokens)
    pack = partial(fp_quant.pack, pseudo=pseudo) if layout.name == fp_quant.NAME else layout.pack
    packed = pack(model)
    entries = [Entry.of(name, tensor) for name, tensor in packed.tensors.items()]
    digests |= write_tensors(folder, [*entries, *packed.entries])
    config = {**model.config, **packed.config}
    for name, document in {"config.json": config, **packed.documents}.items():
        text = json.dumps(document, indent=2) + "\n"
        digests[name] = write_bytes(folder / name, text.encode())
    return digests, list(packed.notes)
