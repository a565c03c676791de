"""FP-Quant's layout: W4A4 in MXFP4 and NVFP4, every linear layer behind a block transform.

| tensor of a layer                     | realquant                              | pseudoquant     |
|---------------------------------------|----------------------------------------|-----------------|
| qweight                               | U8 [out, in/2], low nibble even column |                 |
| scales                                | U8 [out, in/block], bits of E8M0, E4M3 |                 |
| dqweight                              |                                        | BF16 [out, in]  |
| forward_, backward_hadamard_matrix    | BF16 [g, g], M                         | the same        |
| weight_global_scale, act_global_scale | F32 [1]                                | the same        |

A weight is code x scale / weight_global_scale. Its own MXFP4 scales carry a factor 3; ours are
OCP's, of global scale 1, and with act_global_scale 3 readers multiply as for their own.
"""

from typing import Any

import torch
from torch import Tensor

from lowbit import ScaleFormat
from lowbit.formats import E2M1
from train.export.model import Packed
from train.quantized.layout import StoredLayer
from train.quantized.model import QuantizedModel
from train.quantized.reciprocal import divisor

NAME = "fp_quant"
HOLDS = "mxfp4 with transforms of 32, 64, 128 and nvfp4 with those of 16, 32, 64, 128"
SIZES = {ScaleFormat.E8M0: (32, 64, 128), ScaleFormat.E4M3: (16, 32, 64, 128)}
_MX_ACTIVATIONS, _NV_ACTIVATIONS = 3.0, 10.0  # its constants for scales made on the fly
_BLOCKS = {ScaleFormat.E8M0: 32, ScaleFormat.E4M3: 16}


def refuse(layer: StoredLayer) -> str | None:
    """Why a layer cannot be written; None if it can."""
    format, width = layer.weight.format, layer.weight.codes.shape[1]
    if format.element != E2M1 or _BLOCKS.get(format.scale) != format.block_size:
        return f"{format} is neither mxfp4 nor nvfp4"
    size = _size(layer)
    if size not in SIZES[format.scale]:
        return f"a transform of size {size} is none of {SIZES[format.scale]}"
    return f"{width} inputs are no whole blocks of {size}" if width % size else None


def refuse_mixture(model: QuantizedModel) -> str | None:
    """It has one format and one size of transform for all layers."""
    kinds = {(str(layer.weight.format), _size(layer)) for layer in model.layers.values()}
    return f"it has one format and transform size, not {sorted(kinds)}" if len(kinds) > 1 else None


def _is_mx(layer: StoredLayer) -> bool:
    return layer.weight.format.scale == ScaleFormat.E8M0


def _size(layer: StoredLayer) -> int:
    block = _BLOCKS.get(layer.weight.format.scale, 32)
    return layer.transform.size if layer.transform else block


def pack(model: QuantizedModel, *, pseudo: bool = False) -> Packed:
    """The tensors and the configuration of a model whose every layer can be written."""
    tensors = model.stay()
    for name, layer in model.layers.items():
        own = _tensors(layer, pseudo=pseudo)
        tensors |= {f"{name}.{key}": value for key, value in own.items()}
    first = next(iter(model.layers.values()))
    config: dict[str, Any] = {
        "quant_method": NAME,
        "forward_dtype": "mxfp4" if _is_mx(first) else "nvfp4",
        "forward_method": "abs_max",
        "backward_dtype": "bf16",
        "hadamard_group_size": _size(first),
        "modules_to_not_convert": list(model.kept),
        "store_master_weights": False,
        "pseudoquantization": pseudo,
    }
    return Packed(
        tensors, {"quantization_config": config}, tuple(_notes(model, first, pseudo=pseudo))
    )


def _tensors(layer: StoredLayer, *, pseudo: bool) -> dict[str, Tensor]:
    weight, size = layer.weight, _size(layer)
    matrix = layer.transform.matrix() if layer.transform else torch.eye(size)
    scales = weight.scale.contiguous()
    if pseudo:
        stored = {"dqweight": weight.dequantize(torch.bfloat16)}
    else:
        packed = weight.packed_codes().reshape(len(weight.codes), -1)
        stored = {"qweight": packed, "scales": scales}
    if _is_mx(layer):
        above, inputs = torch.ones(1), _MX_ACTIVATIONS
    else:
        above, inputs = divisor(weight.tensor_scale), _NV_ACTIVATIONS
    return stored | {
        "forward_hadamard_matrix": matrix.bfloat16(),
        "backward_hadamard_matrix": matrix.bfloat16(),
        "weight_global_scale": above,
        "act_global_scale": torch.tensor([inputs]),
    }


def _notes(model: QuantizedModel, first: StoredLayer, *, pseudo: bool) -> list[str]:
    kind = "pseudoquant" if pseudo else "realquant"
    notes = [f"{kind}, read by: fp-quant, transformers' FPQuantConfig, vLLM; none runs on a CPU"]
    if not _is_mx(first):
        notes.append(
            f"act_global_scale is FP-Quant's {_NV_ACTIVATIONS:g}, not calibrated: block maxima of "
            "activations above 268 clip"
        )
    if any(layer.activations is None for layer in model.layers.values()):
        notes.append("its readers quantize activations as well (W4A4), which this model does not")
    if model.parted():
        notes.append("vLLM takes one global scale over fused layers; here theirs differ")
    return notes


def read(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Names to BF16 weights in the transformed basis, by the table above: our own reader."""
    found = {n: t for n, t in tensors.items() if n.rpartition(".")[2] in ("weight", "bias")}
    codes = torch.tensor([E2M1.decode(code) for code in range(16)])
    for name, packed in tensors.items():
        stem, _, kind = name.rpartition(".")
        if kind == "dqweight":
            found[f"{stem}.weight"] = packed
        elif kind == "qweight":
            stored = tensors[f"{stem}.scales"]
            is_nv = config["forward_dtype"] == "nvfp4"
            scale = stored.view(torch.float8_e4m3fn if is_nv else torch.float8_e8m0fnu).float()
            both = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
            values = codes[both.long()].reshape(*scale.shape, -1)
            above = tensors[f"{stem}.weight_global_scale"]
            decoded = (values * (scale / above)[..., None]).reshape(both.shape)
            found[f"{stem}.weight"] = decoded.bfloat16()
    return found
