"""`lowbit quantize` against plain transformers and lowbit's pure functions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lowbit import Transform, block_format, fake_quantize, transformed
from lowbit.ptq import Observer, Order, Search, Solver, gptq, observe
from train.quantized.layout import DOCUMENT
from train.quantized.model import read_quantized
from train.quantized.module import as_module

Quantize = Callable[..., int]
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
READERS = (QKV, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))


def _model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def _windows(text: Path) -> torch.Tensor:
    """The calibration's: evenly spread, as `lowbit eval` spreads its own."""
    ids = np.frombuffer(text.read_bytes() + b"\n", np.uint8)
    starts = np.linspace(0, len(ids) - 49, 6)[1:-1].astype(int)
    return torch.tensor(np.stack([ids[start : start + 48] for start in starts])).long()


def _hessians(model: nn.Module, windows: torch.Tensor, see: Callable[..., Any]) -> dict[str, Any]:
    """XᵀX of every linear layer, by hooks on the whole model."""
    found: dict[str, Any] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":

            def hook(_: Any, args: Any, name: str = name) -> None:
                x = see(args[0]).reshape(-1, args[0].shape[-1])
                found[name] = found.get(name, 0) + (x.T @ x).double()

            handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        for window in windows:
            model(input_ids=window[None])
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
def test_gptq_of_each_kind_of_decoder(
    kind: str, make_model: Callable[..., Path], quantize: Quantize, text: Path, tmp_path: Path
) -> None:
    """Codes are those of the pure functions on Hessians that plain hooks collect."""
    folder, turned, format = make_model(kind), Transform("hadamard", 32), block_format("nvfp4")
    flags = ["--format", "nvfp4", "--transform", "hadamard", "--transform-size", "32"]
    assert quantize(folder, tmp_path / "out", *flags) == 0
    stored, model = read_quantized(tmp_path / "out"), _model(folder)
    hessians = _hessians(model, _windows(text), lambda x: transformed(x, turned))
    assert len(stored.layers) == 21
    for block in range(3):
        for group in READERS:
            names = [f"model.layers.{block}.{name}" for name in group]
            weight = torch.cat([model.get_submodule(name).weight.detach() for name in names])
            weight = transformed(weight, turned, inverse_transpose=True)
            h = hessians[names[0]]
            scales = observe(weight, format, Observer(Search.AFTER), h.diagonal())
            found = gptq(weight, h, format, scales, Solver(Order.ACTIVATION)).weight
            codes = torch.cat([stored.layers[name].weight.codes for name in names])
            assert torch.equal(codes, found.codes), names
            assert len({stored.layers[name].weight.tensor_scale.item() for name in names}) == 1
    others = stored.others
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in stored.layers:
            assert torch.equal(others[name], parameter)


def test_rounding_to_nearest_needs_no_text_and_fuses_the_tensor_scale(
    make_model: Callable[..., Path], quantize: Quantize, tmp_path: Path
) -> None:
    folder = make_model()
    flags = ["--format", "nvint4", "--method", "rtn", "--observer", "minmax"]
    assert quantize(folder, tmp_path / "out", *flags, calibrated=False) == 0
    stored, model = read_quantized(tmp_path / "out"), _model(folder)
    assert stored.method["calibration"] is None
    for group in READERS:
        names = [f"model.layers.1.{name}" for name in group]
        whole = torch.cat([model.get_submodule(name).weight.detach() for name in names])
        expected = fake_quantize(whole, "nvint4") + 0.0
        found = torch.cat([stored.layers[name].weight.dequantize() for name in names])
        assert torch.equal(found, expected)
        error = float((expected - whole)[: len(model.get_submodule(names[0]).weight)].norm())
        size = float(model.get_submodule(names[0]).weight.detach().norm())
        document = json.loads((tmp_path / "out" / DOCUMENT).read_text())
        said = document["layers"][names[0]]["error"]
        assert said == pytest.approx((error / size) ** 2, rel=1e-4)


def test_later_blocks_see_what_earlier_ones_became(
    make_model: Callable[..., Path], quantize: Quantize, text: Path, tmp_path: Path
) -> None:
    """--inputs quantized: of block 1, the Hessian behind a stored block 0, inputs quantized."""
    folder, turned = make_model(), Transform("dct", 32)
    flags = ["--format", "mxfp4", "--activations", "mxint8", "--inputs", "quantized"]
    flags += ["--transform", "dct", "--transform-size", "32"]
    assert quantize(folder, tmp_path / "out", *flags) == 0
    stored, model = read_quantized(tmp_path / "out"), _model(folder)
    model.model.layers[0] = as_module(stored, torch.float32, exported=False).model.layers[0]
    name = "model.layers.1.self_attn.q_proj"

    def see(x: torch.Tensor) -> torch.Tensor:
        return fake_quantize(transformed(x, turned), "mxint8")

    h = _hessians(model, _windows(text), see)[name]
    format = block_format("mxfp4")
    names = [f"model.layers.1.{each}" for each in QKV]
    weight = torch.cat([model.get_submodule(each).weight.detach() for each in names])
    weight = transformed(weight, turned, inverse_transpose=True)
    scales = observe(weight, format, Observer(Search.AFTER), h.diagonal())
    found = gptq(weight, h, format, scales, Solver()).weight
    codes = torch.cat([stored.layers[each].weight.codes for each in names])
    assert torch.equal(codes, found.codes)


@pytest.mark.parametrize(
    ("transform", "most"),  # none: 0.06; Fastfood is far from orthogonal
    [("hadamard", 0.08), ("fast_food", 0.4), ("full", 0.08), ("kronecker", 0.08)],
)
def test_eight_bits_in_any_basis_compute_what_the_model_did(
    transform: str, most: float, make_model: Callable[..., Path], quantize: Quantize, tmp_path: Path
) -> None:
    folder = make_model()
    flags = ["--format", "mxint8", "--transform", transform, "--transform-size", "32"]
    assert quantize(folder, tmp_path / "out", *flags, "--method", "rtn", calibrated=False) == 0
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = _model(folder)(input_ids=ids).logits
        found = as_module(read_quantized(tmp_path / "out"), torch.float32, exported=False)(
            input_ids=ids
        ).logits
    assert float((found - expected).norm() / expected.norm()) < most


def test_a_shift_towards_full_precision_inputs(
    make_model: Callable[..., Path], quantize: Quantize, tmp_path: Path
) -> None:
    """Other codes than without, from the first block on where inputs are quantized."""
    folder = make_model()
    flags = ["--format", "mxfp4", "--activations", "mxfp4", "--inputs", "quantized"]
    assert quantize(folder, tmp_path / "0", *flags) == 0
    assert quantize(folder, tmp_path / "25", *flags, "--alpha", "0.25") == 0
    plain, shifted = read_quantized(tmp_path / "0"), read_quantized(tmp_path / "25")
    assert (plain.method["alpha"], shifted.method["alpha"]) == (0.0, 0.25)
    for name in plain.layers:
        assert not torch.equal(plain.layers[name].weight.codes, shifted.layers[name].weight.codes)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_run_that_was_stopped_goes_on_with_the_same_bytes(
    at: int,
    make_model: Callable[..., Path],
    quantize: Quantize,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from train.ptq.work import Work

    folder = make_model()
    flags = ["--format", "nvfp4", "--activations", "nvfp4", "--inputs", "quantized"]
    assert quantize(folder, tmp_path / "whole", *flags) == 0
    finish = Work.finish

    def stopped(self: Work, index: int, *rest: Any) -> Any:
        if index == at:
            raise KeyboardInterrupt
        return finish(self, index, *rest)

    monkeypatch.setattr(Work, "finish", stopped)
    assert quantize(folder, tmp_path / "out", *flags) == 130
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Work, "finish", finish)
    assert at == 0 or quantize(folder, tmp_path / "out", *flags, "--damping", "0.1") == 2
    assert at == 0 or "another quantization" in capsys.readouterr().err
    assert quantize(folder, tmp_path / "out", *flags) == 0
    assert f"block {at}/3" not in capsys.readouterr().out
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "out").iterdir())
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert not (tmp_path / "out.partial").exists()
    assert quantize(folder, tmp_path / "out", *flags) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_recipes_fields_are_the_flags(
    make_model: Callable[..., Path], quantize: Quantize, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("format: {name: mxfp4, scale_rule: floor}\nmethod: rtn\nobserver: minmax\n")
    out = tmp_path / "out"
    flags = ["--recipe", str(recipe), "--observer", "mse"]
    assert quantize(make_model(), out, *flags, calibrated=False) == 0
    method = json.loads((out / "quantization.json").read_text())["method"]
    assert (method["method"], method["observer"], method["search"]) == ("rtn", "mse", "after")
    assert read_quantized(out).layers["model.layers.0.mlp.up_proj"].weight.format == block_format(
        "mxfp4", scale_rule=type(block_format("mxfp4").scale_rule)("floor")
    )


RECIPES = sorted((Path(__file__).parents[3] / "configs" / "ptq").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_works(
    recipe: Path, make_model: Callable[..., Path], quantize: Quantize, tmp_path: Path
) -> None:
    wide = make_model(hidden_size=128, intermediate_size=256, num_hidden_layers=1, head_dim=32)
    assert quantize(wide, tmp_path / "out", "--recipe", str(recipe)) == 0
    said = json.loads((tmp_path / "out" / DOCUMENT).read_text())["layers"]
    assert all(0 < one["error"] < 0.05 for one in said.values())


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 7
