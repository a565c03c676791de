"""Our own layout: what is written is what is read, and what transformers computes with it."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lowbit import IntFormat, block_format, fake_quantize, quantize
from lowbit.definition.transforms import NAMES, Transform, transformed
from train.quantized import tensors
from train.quantized.layout import StoredLayer, write
from train.quantized.model import read_quantized
from train.quantized.module import as_module
from train.quantized.tensors import Entry, entries_of

FORMATS = ("mxint8", "mxfp6", "mxfp4", "nvfp4", "nvint4", "int8")


def _transform(name: str) -> Transform:
    return Transform(name, 16, 3 if name in NAMES[5:] else None)


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        attention_bias=True, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _stored(
    model: LlamaForCausalLM, target: Path, format: str, transform: Transform | None
) -> dict[str, StoredLayer]:
    layers, state = {}, dict(model.named_parameters())
    for name, module in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, nn.Linear):
            weight = state.pop(f"{name}.weight").detach()
            if transform:
                weight = transformed(weight, transform, inverse_transpose=True)
            layers[name] = StoredLayer(quantize(weight, format), block_format("mxint8"), transform)
    entries = [Entry.of(name, tensor) for name, tensor in state.items()]
    entries += [entry for name, layer in layers.items() for entry in layer.entries(name)]
    described = {name: layer.describe() for name, layer in layers.items()}
    config = json.dumps(model.config.to_dict()).encode()
    write(target, iter(entries), {"layers": described}, {"config.json": config})
    return layers


@pytest.mark.parametrize("format", FORMATS)
def test_a_stored_model_computes_what_the_definition_does(
    model: LlamaForCausalLM, tmp_path: Path, format: str
) -> None:
    transform = Transform("hadamard", 16, 5)
    layers = _stored(model, tmp_path / "out", format, transform)
    found = read_quantized(tmp_path / "out")
    for name, layer in layers.items():
        read = found.layers[name]
        assert torch.equal(read.weight.codes, layer.weight.codes)
        assert torch.equal(read.weight.dequantize(), layer.weight.dequantize())
        assert (read.weight.format, read.transform) == (layer.weight.format, transform)
    ids = torch.arange(20)[None]
    computed = as_module(found, torch.float32, exported=False)(input_ids=ids).logits

    def witness(module: nn.Linear, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (fake_quantize(transformed(inputs[0], transform), "mxint8"),)

    for name in layers:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(witness)
        module.weight.data = layers[name].weight.dequantize()
    assert torch.equal(computed, model(input_ids=ids).logits)


@pytest.mark.parametrize("name", NAMES)
def test_a_reload_gives_the_same_matrix(model: LlamaForCausalLM, tmp_path: Path, name: str) -> None:
    transform = _transform(name)
    _stored(model, tmp_path / "out", "mxfp4", transform)
    read = read_quantized(tmp_path / "out").layers["model.layers.1.mlp.up_proj"].transform
    assert read is not None and torch.equal(read.matrix(), transform.matrix())
    assert read.is_stored == (read.given is not None)


def test_plain_safetensors_files_and_shards_are_read_by_others(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "SHARD_BYTES", 40_000)
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/config.json").write_bytes((tmp_path / "hf/config.json").read_bytes())
    digests = tensors.write_tensors(
        tmp_path / "copy", entries_of(tmp_path / "hf/model.safetensors")
    )
    assert len(digests) > 3
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    for name, parameter in model.named_parameters():
        assert torch.equal(copy.get_parameter(name), parameter)


def test_formats_with_changes_come_back(model: LlamaForCausalLM, tmp_path: Path) -> None:
    format = block_format("mxint4", element=IntFormat(4, symmetric=False), block_size=16)
    layer = StoredLayer(quantize(torch.randn(8, 32), format))
    from train.config.formats import read_format

    assert read_format(json.loads(json.dumps(layer.describe()["format"]))) == format


@pytest.mark.parametrize("damage", ["model.safetensors", "config.json", "quantization.json"])
def test_a_damaged_folder_is_refused(model: LlamaForCausalLM, tmp_path: Path, damage: str) -> None:
    _stored(model, tmp_path / "out", "mxint4", None)
    path = tmp_path / "out" / damage
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    with pytest.raises(ValueError, match=f"{damage} is not what was written"):
        read_quantized(tmp_path / "out")
