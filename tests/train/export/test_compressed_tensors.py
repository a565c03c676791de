"""compressed-tensors: what stock transformers reads is what we wrote."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.transform import TransformConfig, apply_transform_config
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lowbit import BlockFormat, ScaleFormat, ScaleRule, block_format
from lowbit.definition.transforms import Transform
from train.export.compressed_tensors import global_scale
from train.export.module import as_module
from train.export.reload import compare, read_tensors, reload

FORMATS = ("mxfp4", "mxfp6", "mxfp8", "nvfp4", "mxint8", "mxint6", "mxint4")


def _stock(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


@pytest.mark.parametrize("format", FORMATS)
@torch.no_grad()
def test_transformers_reads_our_weights_and_computes_the_bf16_exports_logits(
    quantized: Callable[..., Any], export: Callable[..., Path], tokens: Tensor, format: str
) -> None:
    model = quantized(format)
    read, plain = _stock(export(model, "compressed-tensors")), _stock(export(model, "bf16"))
    assert torch.equal(read(tokens).logits, plain(tokens).logits)
    for name, layer in model.layers.items():
        ours = layer.weight.dequantize(torch.bfloat16)
        assert torch.equal(read.get_submodule(name).weight, ours), name
        assert torch.equal(plain.get_submodule(name).weight, ours), name


@torch.no_grad()
def test_a_mixture_of_formats_is_one_folder(
    quantized: Callable[..., Any], export: Callable[..., Path]
) -> None:
    model = quantized(lambda name: "mxint8" if name.endswith("down_proj") else "mxfp4")
    folder = export(model, "compressed-tensors")
    written = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert written["format"] == "mixed-precision" and len(written["config_groups"]) == 2
    assert "14 weights equal the bfloat16 of ours; log-probabilities of 64 tokens 0 apart" in (
        compare(folder, model)
    )


@pytest.mark.parametrize("scale", ["bf16-scales", "channels"])
def test_integers_with_bf16_scales(
    quantized: Callable[..., Any], export: Callable[..., Path], scale: str
) -> None:
    """The formats that FP-Quant calls `int`, by group and by channel."""
    size = 64 if scale == "bf16-scales" else -1
    changes: dict[str, Any] = {"scale": ScaleFormat.BF16, "scale_rule": None, "block_size": size}
    model = quantized(block_format("mxint4", **changes))
    assert "0 apart" in compare(export(model, "compressed-tensors"), model)


@pytest.mark.parametrize(
    "activations",
    [block_format("mxfp8"), block_format("mxfp4", scale_rule=ScaleRule.EVEN)],
    ids=str,
)
@torch.no_grad()
def test_activations_are_rounded_as_ours_by_compressed_tensors(
    quantized: Callable[..., Any], export: Callable[..., Path], tokens: Tensor,
    activations: BlockFormat,
) -> None:  # fmt: skip
    model = quantized(activations.name, activations)
    read = _stock(export(model, "compressed-tensors"))
    assert torch.equal(read(tokens).logits, as_module(model)(tokens).logits)
    kept = _stock(export(quantized(activations.name), "compressed-tensors"))
    assert not torch.equal(kept(tokens).logits, read(tokens).logits)


TRANSFORMS = (
    Transform("hadamard", 32),
    Transform("hadamard", 64, 7),
    Transform("fast_food", 32, 3),
)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: f"{t.name}-{t.size}-{t.seed}")
@torch.no_grad()
def test_a_rotated_export_on_its_parent_under_apply_transform_config(
    tiny_llama: LlamaForCausalLM, quantized: Callable[..., Any], export: Callable[..., Path],
    tokens: Tensor, tmp_path: Path, transform: Transform,
) -> None:  # fmt: skip
    """transformers alone computes something else; the library's own transforms compute ours."""
    model = quantized("mxfp4", transform=transform)
    folder = export(model, "compressed-tensors")
    ours = as_module(model, torch.float32)(tokens).logits
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    tiny_llama.save_pretrained(tmp_path / "parent")
    parent = _stock(tmp_path / "parent").float()  # BF16's values, products without its rounding
    before = parent(tokens).logits
    apply_transform_config(parent, TransformConfig.model_validate(config["transform_config"]))
    stored = read_tensors(folder)
    matrices = {name: t for name, t in stored.items() if "_input.weight" in name}
    assert bool(matrices) == (transform.seed is not None)
    if not matrices:  # a random matrix is the library's own draw until ours replaces it
        assert _distance(parent(tokens).logits, before) < 1e-5
    weights = {f"{n}.weight": layer.weight.dequantize() for n, layer in model.layers.items()}
    missing, unexpected = parent.load_state_dict(weights | matrices, strict=False)
    assert not unexpected and not any("proj.weight" in name for name in missing)
    assert _distance(parent(tokens).logits, ours) < 1e-5
    assert _distance(_stock(folder)(tokens).logits, ours) > 0.3  # the trap that the docs name
    assert torch.equal(reload(folder).model(tokens).logits, as_module(model)(tokens).logits)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b).norm() / b.norm())


def test_the_global_scale_gives_the_same_bf16_numbers() -> None:
    """Its reciprocal is rounded: of 400 scales, nearly all have a neighbour without an effect."""
    generator = torch.Generator().manual_seed(0)
    exact = 0
    codes = torch.tensor([0.5, 1, 1.5, 2, 3, 4, 6])
    scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()[:, None]
    for scale in torch.rand(400, generator=generator) * 2.0**-8:
        theirs = codes * (scales / global_scale(scale))
        exact += torch.equal(theirs.bfloat16(), (codes * scales * scale).bfloat16())
    assert exact >= 399


def test_formats_without_a_place_are_refused(
    quantized: Callable[..., Any], export: Callable[..., Path]
) -> None:
    for name in ("nvint4", "nvint8", "int8", "mxfp8_e5m2", "mxfp6_e3m2"):
        with pytest.raises(ValueError, match=rf"{name} is not among.*These can: bf16, lowbit"):
            export(quantized(name), "compressed-tensors")
    odd = replace(block_format("mxfp4"), block_size=16)
    with pytest.raises(ValueError, match="block_size=16"):
        export(quantized(odd), "compressed-tensors")
