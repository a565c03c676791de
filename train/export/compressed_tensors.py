"""compressed-tensors: what vLLM, transformers and llm-compressor read.

| weights in blocks of g      | `format`             | tensors of a layer [out, in]             |
|-----------------------------|----------------------|------------------------------------------|
| integers of b = 4, 6, 8     | pack-quantized       | weight_packed I32 [out, in b/32],        |
| bits, E8M0 or BF16 scales   |                      | weight_scale BF16 [out, in/g],           |
|                             |                      | weight_shape I64 [2]                     |
| E2M1, E8M0, g = 32          | mxfp4-pack-quantized | weight_packed U8 [out, in/2],            |
|                             |                      | weight_scale U8 [out, in/32]             |
| E2M3, E8M0, g = 32          | mxfp6-pack-quantized | weight_packed U8 [out, 3 in/4], the same |
| E4M3, E8M0, g = 32          | mxfp8-quantized      | weight F8_E4M3, weight_scale U8          |
| E2M1, E4M3, g = 16          | nvfp4-pack-quantized | weight_packed U8, weight_scale F8_E4M3,  |
|                             |                      | weight_global_scale F32 [1]              |
| inputs in nvfp4 besides     |                      | input_global_scale F32 [1]               |

A global scale divides: a true scale is the stored one over it. A transform is written as
`transform_config`, its matrix beside each layer's weight unless it is a Hadamard without signs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit import BlockFormat, IntFormat, QuantizedTensor, ScaleFormat, ScaleRule
from lowbit.formats import E2M1, E2M3, E4M3
from train.export.compressed_transforms import transforms
from train.export.model import Packed
from train.quantized.layout import StoredLayer
from train.quantized.model import QuantizedModel
from train.quantized.reciprocal import divisor

NAME = "compressed-tensors"
HOLDS = "mxint8, mxint6, mxint4, mxfp8, mxfp6, mxfp4, nvfp4, such integers with BF16 scales"


@dataclass(frozen=True)
class _Scheme:
    """How one format of weights is written down."""

    format: str
    arguments: Mapping[str, Any]
    readers: str

    def weights(self, block_size: int) -> dict[str, Any]:
        """`weights` of a config group."""
        strategy, size = ("channel", None) if block_size == -1 else ("group", block_size)
        plain = {"symmetric": True, "dynamic": False, "strategy": strategy, "group_size": size}
        return plain | dict(self.arguments)


_MX = {"type": "float", "scale_dtype": "torch.uint8"}
_FLOATS = {
    (E2M1, ScaleFormat.E8M0, 32): _Scheme(
        "mxfp4-pack-quantized", {"num_bits": 4} | _MX, "compressed-tensors, transformers, vLLM"
    ),
    (E2M3, ScaleFormat.E8M0, 32): _Scheme(
        "mxfp6-pack-quantized", {"num_bits": 6} | _MX, "compressed-tensors, transformers"
    ),
    (E4M3, ScaleFormat.E8M0, 32): _Scheme(
        "mxfp8-quantized", {"num_bits": 8} | _MX, "compressed-tensors, transformers, vLLM"
    ),
    (E2M1, ScaleFormat.E4M3, 16): _Scheme(
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group"}
        | {"scale_dtype": "torch.float8_e4m3fn"},
        "compressed-tensors, transformers, vLLM",
    ),
}  # fmt: skip

_RULES: dict[Any, ScaleRule] = {
    E2M1: ScaleRule.EVEN,
    E2M3: ScaleRule.EVEN,
    E4M3: ScaleRule.RCEIL,
}  # of activations


def _scheme(format: BlockFormat) -> _Scheme | None:
    if isinstance(format.block_size, tuple):
        return None
    if not isinstance(format.element, IntFormat):
        return _FLOATS.get((format.element, format.scale, format.block_size))
    bits, exact = format.element.bits, format.scale in (ScaleFormat.E8M0, ScaleFormat.BF16)
    if bits not in (4, 6, 8) or not exact:
        return None
    readers = "compressed-tensors, transformers" + (", vLLM" if bits != 6 else "")
    return _Scheme("pack-quantized", {"num_bits": bits, "type": "int"}, readers)


def refuse(layer: StoredLayer) -> str | None:
    """Why a layer cannot be written; None if it can."""
    format, (_, width) = layer.weight.format, layer.weight.codes.shape
    if (scheme := _scheme(format)) is None:
        return f"{format} is not among {HOLDS}"
    block = 32 if scheme.format == "pack-quantized" else format.block_size
    assert isinstance(block, int)
    if width % block or width % max(1, int(str(format.block_size))):
        return f"{width} inputs are no whole blocks of {block}"
    return None


def pack(model: QuantizedModel) -> Packed:
    """The tensors and the configuration of a model whose every layer can be written."""
    tensors = model.stay()
    groups: dict[tuple[BlockFormat, BlockFormat | None], list[str]] = {}
    for name, layer in model.layers.items():
        tensors |= {f"{name}.{key}": value for key, value in _tensors(layer.weight).items()}
        if (inputs := _inputs(layer)) and inputs.scale == ScaleFormat.E4M3:
            assert layer.input_amax  # or they were none
            above = torch.tensor([E4M3.max * E2M1.max / layer.input_amax])
            tensors[f"{name}.input_global_scale"] = above
        groups.setdefault((layer.weight.format, _inputs(layer)), []).append(name)
    schemes = {key: _known(key[0]) for key in groups}
    formats = sorted({scheme.format for scheme in schemes.values()})
    config = {
        "quant_method": NAME,
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {
                "targets": ["Linear"] if len(groups) == 1 else names,
                "weights": schemes[key].weights(_block(key[0])),
                "input_activations": key[1] and _activations(key[1]),
                "output_activations": None,
                "format": schemes[key].format,
            }
            for number, (key, names) in enumerate(groups.items())
        },
        "ignore": list(model.kept),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    if model.transforms:
        config["transform_config"], matrices = transforms(model)
        tensors |= matrices
    return Packed(
        tensors, {"quantization_config": config}, tuple(_notes(model, list(schemes.values())))
    )


def _known(format: BlockFormat) -> _Scheme:
    scheme = _scheme(format)
    assert scheme is not None  # refuse has been asked
    return scheme


def _block(format: BlockFormat) -> int:
    assert isinstance(format.block_size, int)
    return format.block_size


def _tensors(weight: QuantizedTensor) -> dict[str, Tensor]:
    rows, columns = weight.codes.shape
    if isinstance(weight.format.element, IntFormat):
        bits = weight.format.element.bits
        raised = (weight.codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
        moved = QuantizedTensor(raised, weight.scale, None, weight.format, weight.dim)
        return {
            "weight_packed": moved.packed_codes().view(torch.int32).reshape(rows, -1),
            "weight_scale": weight.scale_values().bfloat16(),
            "weight_shape": torch.tensor([rows, columns]),
        }
    if weight.format.element == E4M3:
        return {"weight": weight.codes.view(torch.float8_e4m3fn), "weight_scale": weight.scale}
    packed = {"weight_packed": weight.packed_codes().reshape(rows, -1)}
    if weight.format.scale == ScaleFormat.E8M0:
        return packed | {"weight_scale": weight.scale}
    return packed | {
        "weight_scale": weight.scale.view(torch.float8_e4m3fn),
        "weight_global_scale": divisor(weight.tensor_scale),
    }


def _inputs(layer: StoredLayer) -> BlockFormat | None:
    """The layer's activations, if the layout has them: of nvfp4 with a scale from calibration."""
    format = layer.activations
    if format is None or _scheme(format) is None or isinstance(format.element, IntFormat):
        return None
    return format if format.scale != ScaleFormat.E4M3 or layer.input_amax else None


def _activations(format: BlockFormat) -> dict[str, Any]:
    found = _known(format).weights(_block(format)) | {"dynamic": True}
    if format.scale == ScaleFormat.E4M3:
        found |= {"dynamic": "local", "observer": "static_minmax"}  # above the blocks: calibrated
    return found


def _notes(model: QuantizedModel, schemes: list[_Scheme]) -> list[str]:
    notes = [f"read by: {scheme.readers}" for scheme in schemes[:1]]
    if any(scheme.readers.count("vLLM") == 0 for scheme in schemes):
        notes.append("vLLM does not read 6-bit weights: it takes them for another width and fails")
    if model.transforms:
        notes.append(
            "rotated: transformers loads this without an error, ignores transform_config and "
            "computes garbage; honoured by compressed_tensors.transform.apply_transform_config and "
            "by lowbit"
        )
    lost = {layer.activations for layer in model.layers.values() if layer.activations}
    kept = {_inputs(layer) for layer in model.layers.values()}
    if lost - kept:
        shown = ", ".join(sorted(map(str, lost - kept)))
        notes.append(f"activations stay in BF16: no reader of this layout computes {shown}")
        if any(f.scale == ScaleFormat.E4M3 and _scheme(f) for f in lost - kept):
            notes[-1] += (
                " without the input scale that `lowbit quantize --text` finds (of a run too)"
            )
    for format in sorted(filter(None, kept), key=str):
        if format.scale == ScaleFormat.E4M3:
            notes.append(
                f"activations: readers take a tensor scale from calibration for {format.name}, "
                "this model each input's own"
            )
        elif format.scale_rule is not (rule := _RULES[format.element]):
            own = getattr(format.scale_rule, "value", None)
            what = f"choose the scales of {format.name} by the rule {rule.value}"
            notes.append(f"activations: readers {what}, this model by {own}")
    if model.parted():
        notes.append(
            f"vLLM takes one global scale over {', '.join(model.parted()[0])} and the like: theirs "
            "differ, so that it would decode other weights; transformers reads them as they are"
        )
    return notes
