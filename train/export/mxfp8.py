"""transformers' own MXFP8: `weight` F8_E4M3 and `weight_scale_inv` U8 [out, in/32], no package."""

import torch

from lowbit import ScaleFormat
from lowbit.formats import E4M3
from train.export.model import Packed
from train.quantized.layout import StoredLayer
from train.quantized.model import QuantizedModel

NAME = "mxfp8"
HOLDS = "mxfp8 without a transform"


def refuse(layer: StoredLayer) -> str | None:
    """Why a layer cannot be written; None if it can."""
    format = layer.weight.format
    if (format.element, format.scale, format.block_size) != (E4M3, ScaleFormat.E8M0, 32):
        return f"{format} is not mxfp8"
    if layer.transform is not None:
        return "its weights are rotated, and the layout has no transforms"
    width = layer.weight.codes.shape[1]
    return f"{width} inputs are no whole blocks of 32" if width % 32 else None


def pack(model: QuantizedModel) -> Packed:
    """The tensors and the configuration of a model whose every layer can be written."""
    tensors = model.stay()
    for name, layer in model.layers.items():
        tensors[f"{name}.weight"] = layer.weight.codes.view(torch.float8_e4m3fn)
        tensors[f"{name}.weight_scale_inv"] = layer.weight.scale
    config = {
        "quant_method": "mxfp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [1, 32],
        "scale_fmt": "ue8m0",
        "modules_to_not_convert": list(model.kept),
    }
    notes = ["read by: transformers (on a CPU, and on GPUs before Hopper, as BF16 weights)"]
    if any(layer.activations is None for layer in model.layers.values()):
        notes.append("its kernels on GPUs quantize activations to FP8, too")
    return Packed(tensors, {"quantization_config": config}, tuple(notes))
