"""Plain Hugging Face weights in BF16: what every reader loads, with the weights' error alone."""

from train.export.model import Packed, plain_weight
from train.quantized.layout import StoredLayer
from train.quantized.model import QuantizedModel

NAME = "bf16"
HOLDS = "every format, decoded; transforms are undone"


def refuse(layer: StoredLayer) -> str | None:
    """Nothing is refused."""
    return None


def pack(model: QuantizedModel) -> Packed:
    """Decoded weights in the basis that a layer without a transform needs."""
    tensors = model.stay()
    tensors |= {f"{name}.weight": plain_weight(layer) for name, layer in model.layers.items()}
    notes = ["read by: all that reads Hugging Face folders"]
    if model.transforms:
        notes.append("rotated weights are turned back in FP32 and rounded to BF16 once")
    if lost := {layer.activations for layer in model.layers.values()} - {None}:
        shown = ", ".join(sorted(map(str, lost)))
        notes.append(f"activations stay in BF16: plain layers do not compute {shown}")
    return Packed(tensors, notes=tuple(notes))
