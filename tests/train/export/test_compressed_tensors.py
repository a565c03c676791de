"""compressed-tensors: what stock transformers reads is what we wrote."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compressed_tensors.transform import TransformConfig, apply_transform_config
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lowbit import BlockFormat, ScaleFormat, ScaleRule, block_format, quantize
from lowbit.definition.rounding import round_to_element_
from lowbit.definition.transforms import Transform
from lowbit.formats import E2M1, Rounding
from train.export.reload import compare, read_tensors, reload
from train.ptq.request import Method
from train.ptq.solve import solve
from train.quantized.module import as_module
from train.quantized.reciprocal import divisible, divisor

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


@torch.no_grad()
def test_nvfp4_activations_go_with_the_scale_that_calibration_found(
    quantized: Callable[..., Any], export: Callable[..., Path], tokens: Tensor
) -> None:
    """Witness: E4M3 by torch's cast under the scale of the file; uncalibrated, inputs stay."""
    nvfp4 = block_format("nvfp4")
    model = quantized("nvfp4", nvfp4)
    seen: dict[str, float] = {}
    plain = as_module(quantized("nvfp4"))
    for name in model.layers:
        plain.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, float(args[0].abs().max()))
        )
    plain(tokens)
    calibrated = {n: replace(layer, input_amax=seen[n]) for n, layer in model.layers.items()}
    folder = export(replace(model, layers=calibrated), "compressed-tensors")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    inputs = config["config_groups"]["group_0"]["input_activations"]
    assert inputs["dynamic"] == "local" and inputs["strategy"] == "tensor_group"
    stored = read_tensors(folder)
    for name, amax in seen.items():
        assert float(stored[f"{name}.input_global_scale"]) == pytest.approx(448 * 6 / amax)
    read = _stock(folder)
    read(tokens)  # compressed weights unpack at the first call
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(2)).bfloat16()
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"):
        layer = read.get_submodule(name)
        rounded = F.linear(_nvfp4_under(x, 448 * 6 / seen[name]), layer.weight)
        unrounded = _distance(F.linear(x, layer.weight), rounded)
        assert (
            _distance(layer(x), rounded) < 0.3 * unrounded
        )  # its scales are BF16: a few ties flip
    assert f"{next(iter(seen))}.input_global_scale" not in read_tensors(
        export(model, "compressed-tensors")
    )


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


def _nvfp4_under(x: Tensor, above: float) -> Tensor:
    blocks = x.float().unflatten(-1, (-1, 16))
    wanted = blocks.abs().amax(-1, keepdim=True) / 6 * above
    scale = wanted.clamp(max=448).to(torch.float8_e4m3fn).float() / above
    codes = round_to_element_(blocks / scale, E2M1, Rounding.NEAREST).clamp(-6, 6)
    return (codes * scale).flatten(-2).to(x.dtype)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b).norm() / b.norm())


CODES = torch.tensor([0.5, 1, 1.5, 2, 3, 4, 6])
SCALES = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()[:, None]


def _is_exact(tensor_scale: Tensor) -> bool:
    theirs = CODES * (SCALES / divisor(tensor_scale))
    return torch.equal(theirs.bfloat16(), (CODES * SCALES * tensor_scale).bfloat16())


def test_a_divisor_gives_the_same_bf16_numbers() -> None:
    """The reciprocal is rounded: nearly all scales have a neighbour of it without an effect, and
    those with few bits a neighbour that has one.
    """
    scales = torch.rand(400, generator=torch.Generator().manual_seed(0)) * 2.0**-8
    assert sum(_is_exact(scale) for scale in scales) >= 399
    short = torch.arange(1, 65) / 2.0**13
    assert not _is_exact(short[6]) and sum(_is_exact(scale) for scale in short) < 60
    for scale in (*scales, *short):
        near = divisible(scale)
        assert _is_exact(near) and abs(float(near / scale) - 1) < 2e-6
        assert torch.equal(near, scale) or not _is_exact(scale)


def test_quantize_leaves_tensor_scales_with_a_divisor() -> None:
    """Of BF16 weights whose largest, over 448 x 6, is 7/8192."""
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = weight.clamp(-2, 2).index_fill(1, torch.tensor([5]), 2.296875)
    method = Method(block_format("nvfp4"), method="rtn", observer="minmax")
    stored = solve(("layer",), {"layer": weight}, method, None)["layer"].layer.weight
    assert stored.tensor_scale is not None and _is_exact(stored.tensor_scale)
    assert not torch.equal(stored.tensor_scale, torch.tensor(7 / 8192))
    plain = quantize(weight.float(), "nvfp4")
    assert torch.equal(stored.scale, plain.scale)
    assert (stored.codes == plain.codes).float().mean() > 0.95  # but for ties between two codes


def test_formats_without_a_place_are_refused(
    quantized: Callable[..., Any], export: Callable[..., Path]
) -> None:
    for name in ("nvint4", "nvint8", "int8", "mxfp8_e5m2", "mxfp6_e3m2"):
        with pytest.raises(ValueError, match=rf"{name} is not among.*These can: bf16, lowbit"):
            export(quantized(name), "compressed-tensors")
    odd = replace(block_format("mxfp4"), block_size=16)
    with pytest.raises(ValueError, match="block_size=16"):
        export(quantized(odd), "compressed-tensors")
