"""GGUF, FP-Quant's and transformers' own MXFP8, by their own readers or their own description."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.vocabulary import byte_vocabulary, trained_vocabulary
from lowbit import block_format
from lowbit.definition.transforms import Transform
from train.export.reload import compare, read_tensors
from train.quantized.layout import StoredLayer
from train.quantized.module import as_module
from train.subjects.gguf import read_gguf
from train.subjects.gguf_llama import llama_of, vocabulary_of

GGUF_TYPES = {"mxint8": "Q8_0", "mxint4": "Q4_0", "mxfp4": "MXFP4"}


@pytest.mark.parametrize("format", GGUF_TYPES)
@torch.no_grad()
def test_gguf_is_read_exactly_by_gguf_transformers_and_ours(
    quantized: Callable[..., Any], export: Callable[..., Path], tokens: Tensor, format: str
) -> None:
    model = quantized(format)
    folder = export(model, "gguf")
    weight = model.layers["model.layers.1.mlp.down_proj"].weight
    stored = {t.name: t for t in gguf.GGUFReader(folder / "model.gguf").tensors}
    found = stored["blk.1.ffn_down.weight"]
    assert found.tensor_type.name == GGUF_TYPES[format]
    decoded = gguf.dequantize(found.data, found.tensor_type)
    assert np.array_equal(decoded, weight.dequantize().numpy())
    ours = as_module(model, torch.float32)
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
    own = llama_of(read_gguf(folder / "model.gguf"))
    for name, layer in model.layers.items():
        for other in (read, own):
            assert torch.equal(other.get_submodule(name).weight, layer.weight.dequantize()), name
    for other in (read, own):
        assert torch.equal(other(tokens).logits, ours(tokens).logits)


@pytest.mark.parametrize("kind", ["bytes", "trained"])
def test_gguf_brings_the_tokenizer(
    quantized: Callable[..., Any], export: Callable[..., Path], kind: str
) -> None:
    text = "12 times 34 is 408, as every child knows. " * 20
    vocabulary = byte_vocabulary() if kind == "bytes" else trained_vocabulary([text], 270)
    model = quantized("mxint8")
    model = type(model)(**vars(model) | {
        "files": {"tokenizer.json": vocabulary.json.encode()},
        "config": {**model.config, "vocab_size": max(vocabulary.size, 257)},
    })  # fmt: skip
    folder = export(model, "gguf")
    file = read_gguf(folder / "model.gguf")
    found = vocabulary_of(file)
    assert found.eos_id == vocabulary.eos_id
    assert found.encode(text).tolist() == vocabulary.encode(text).tolist()
    stock = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    assert stock(text, add_special_tokens=False).input_ids == vocabulary.encode(text).tolist()


def test_gguf_refuses_scales_beyond_f16(
    quantized: Callable[..., Any], export: Callable[..., Path]
) -> None:
    model = quantized("mxint8")
    name, layer = next(iter(model.layers.items()))
    small = type(layer.weight)(**vars(layer.weight) | {"scale": layer.weight.scale - 40})
    model.layers[name] = StoredLayer(small)
    with pytest.raises(ValueError, match=r"do not fit F16.*These can: compressed-tensors, bf16"):
        export(model, "gguf")


def test_gguf_writes_zero_blocks_whose_scale_fits_no_f16(
    quantized: Callable[..., Any], export: Callable[..., Path]
) -> None:
    model = quantized("mxint4")
    layer = model.layers["model.layers.0.mlp.up_proj"]
    layer.weight.codes[0, :32], layer.weight.scale[0, 0] = 0, 0  # 2^-127
    assert "weights equal" in compare(export(model, "gguf"), model)


SHAPES = {
    # [out, in] = [192, 128], [128, 192]; g = 32: those of FPQuantLinear.state_dict()
    "mxfp4": {
        "qweight": (torch.uint8, (192, 64)), "scales": (torch.uint8, (192, 4)),
        "forward_hadamard_matrix": (torch.bfloat16, (32, 32)),
        "backward_hadamard_matrix": (torch.bfloat16, (32, 32)),
        "weight_global_scale": (torch.float32, (1,)), "act_global_scale": (torch.float32, (1,)),
    },
    "nvfp4": {
        "qweight": (torch.uint8, (192, 64)), "scales": (torch.uint8, (192, 8)),
        "forward_hadamard_matrix": (torch.bfloat16, (16, 16)),
        "backward_hadamard_matrix": (torch.bfloat16, (16, 16)),
        "weight_global_scale": (torch.float32, (1,)), "act_global_scale": (torch.float32, (1,)),
    },
}  # fmt: skip


@pytest.mark.parametrize("format", SHAPES)
@pytest.mark.parametrize("pseudo", [False, True])
def test_fp_quants_names_shapes_and_dtypes(
    quantized: Callable[..., Any], export: Callable[..., Path], format: str, pseudo: bool
) -> None:
    model = quantized(format)
    folder = export(model, "fp_quant", pseudo=pseudo)
    tensors = read_tensors(folder)
    prefix = "model.layers.0.mlp.up_proj."
    found = {
        name.removeprefix(prefix): (tensor.dtype, tuple(tensor.shape))
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    expected = dict(SHAPES[format])
    if pseudo:
        del expected["qweight"], expected["scales"]
        expected["dqweight"] = (torch.bfloat16, (192, 128))
    assert found == expected
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "fp_quant", "forward_dtype": format, "forward_method": "abs_max",
        "backward_dtype": "bf16", "hadamard_group_size": 32 if format == "mxfp4" else 16,
        "modules_to_not_convert": ["lm_head"], "store_master_weights": False,
        "pseudoquantization": pseudo,
    }  # fmt: skip
    alpha = tensors[f"{prefix}weight_global_scale"] * tensors[f"{prefix}act_global_scale"]
    assert format == "nvfp4" or float(alpha) == 3
    assert "weights equal" in compare(folder, model)


def test_fp_quant_decodes_by_its_definition(
    quantized: Callable[..., Any], export: Callable[..., Path]
) -> None:
    """Low nibble even column, sign in bit 3, E8M0: written out here once more."""
    model = quantized("mxfp4", transform=Transform("hadamard", 64, 5))
    tensors = read_tensors(export(model, "fp_quant"))
    prefix = "model.layers.1.self_attn.k_proj."
    packed = tensors[f"{prefix}qweight"].numpy()
    nibbles = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[nibbles & 7] * np.where(nibbles >> 3, -1, 1)
    scales = 2.0 ** (tensors[f"{prefix}scales"].numpy().astype(int) - 127)
    weight = model.layers["model.layers.1.self_attn.k_proj"].weight
    assert np.array_equal(values * scales.repeat(32, 1), weight.dequantize().numpy())
    matrix = tensors[f"{prefix}forward_hadamard_matrix"]
    assert torch.equal(matrix, Transform("hadamard", 64, 5).matrix().bfloat16())


@torch.no_grad()
def test_transformers_own_mxfp8(
    quantized: Callable[..., Any], export: Callable[..., Path], tokens: Tensor
) -> None:
    model = quantized("mxfp8")
    read = AutoModelForCausalLM.from_pretrained(export(model, "mxfp8"), dtype=torch.bfloat16)
    for name, layer in model.layers.items():
        assert torch.equal(read.get_submodule(name).weight, layer.weight.dequantize(torch.bfloat16))
    assert torch.equal(read(tokens).logits, as_module(model)(tokens).logits)


@torch.no_grad()
def test_the_plain_export_turns_rotated_weights_back(
    quantized: Callable[..., Any], export: Callable[..., Path], tokens: Tensor
) -> None:
    model = quantized("mxint8", transform=Transform("identity_low_rank", 32, 1))
    read = AutoModelForCausalLM.from_pretrained(export(model, "bf16"), dtype=torch.bfloat16)
    ours = as_module(model, torch.float32)(tokens).logits
    assert float((read(tokens).logits.float() - ours).norm() / ours.norm()) < 0.02


@pytest.mark.parametrize(
    ("layout", "format", "transform", "message"),
    [
        ("gguf", "nvfp4", None, "nvfp4 is none of mxint8, mxint4, mxfp4"),
        ("gguf", "mxfp4", Transform("hadamard", 32), "its weights are rotated"),
        ("mxfp8", "mxfp4", None, "mxfp4 is not mxfp8"),
        ("mxfp8", "mxfp8", Transform("hadamard", 32), "its weights are rotated"),
        ("fp_quant", "mxint4", None, "mxint4 is neither mxfp4 nor nvfp4"),
        ("fp_quant", "mxfp4", Transform("hadamard", 16), "size 16 is none of"),
    ],
)
def test_what_a_layout_lacks_is_refused_with_those_that_have_it(
    quantized: Callable[..., Any], export: Callable[..., Path], layout: str, format: str,
    transform: Transform | None, message: str,
) -> None:  # fmt: skip
    with pytest.raises(ValueError, match=message) as error:
        export(quantized(format, transform=transform), layout)
    able = str(error.value).partition("These can: ")[2].split(", ")
    assert layout not in able
    for other in able:
        export(quantized(format, transform=transform), other)


def test_gguf_is_for_llamas(quantized: Callable[..., Any], export: Callable[..., Path]) -> None:
    model = quantized(block_format("mxint8"))
    other = type(model)(**vars(model) | {"config": {**model.config, "model_type": "qwen3"}})
    with pytest.raises(ValueError, match="a qwen3 model is not among llama, mistral"):
        export(other, "gguf")
