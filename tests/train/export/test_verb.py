"""`lowbit export`: a run and what quantize left become folders, or one line says why not."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowbit import block_format, quantize
from train.cli import main
from train.export import export as verb
from train.export.folder import read_mark
from train.export.layouts import LAYOUTS, write_model
from train.export.source import of_run
from train.quantized.model import read_quantized


@pytest.fixture
def run(fit: Callable[..., int], tmp_path: Path) -> Path:
    assert fit(tmp_path / "run", "mxint8", "--trainer.max_steps", "2") == 0
    return tmp_path / "run"


@pytest.fixture
def out(quantized: Callable[..., Any], tmp_path: Path) -> Path:
    """A model as `lowbit quantize` leaves it."""
    from train.export.folder import seal, staging

    target = tmp_path / "quantized"
    with staging(target) as place:
        digests, _ = write_model(quantized("mxfp4"), LAYOUTS["lowbit"], place, pseudo=False)
        seal(place, digests, {"layout": "lowbit"})
        place.rename(target)
    return target


def test_a_run_exports_directly(run: Path, tmp_path: Path, capsys: Any) -> None:
    """Its weights in its recipe's format, with its tokenizer; the loss of activations is said."""
    weight = AutoModelForCausalLM.from_pretrained(run / "hf").model.layers[0].mlp.up_proj.weight
    for layout in ("compressed-tensors", "gguf", "bf16"):
        target = tmp_path / layout
        assert main(["export", str(run), str(target), "--layout", layout]) == 0
        printed = capsys.readouterr().out
        assert "14 layers of mxint8" in printed and "14 weights equal the" in printed
        assert "reloaded by transformers" in printed
        assert AutoTokenizer.from_pretrained(target)("12").input_ids == [49, 50]
    assert "activations stay in BF16: plain layers do not compute mxint8" in printed
    read = AutoModelForCausalLM.from_pretrained(target)
    ours = quantize(weight.detach(), "mxint8").dequantize(torch.bfloat16)
    assert torch.equal(read.model.layers[0].mlp.up_proj.weight, ours)


def test_what_quantize_left_becomes_every_layout_that_holds_it(
    out: Path, tmp_path: Path, capsys: Any
) -> None:
    document = json.dumps({"rows": [{"model": "x", "KL": 0.25}], "protocol": ["3 windows"]})
    (tmp_path / "eval.json").write_text(document)
    for layout in ("compressed-tensors", "fp_quant", "gguf", "bf16", "lowbit"):
        target = tmp_path / layout
        command = ["export", str(out), str(target), "--layout", layout]
        assert main([*command, "--figures", str(tmp_path / "eval.json")]) == 0, layout
        mark = read_mark(target)
        assert mark is not None and mark["layout"] == layout
        files = json.loads((target / "manifest.json").read_text())["files"]
        assert files.keys() == {path.name for path in target.iterdir()} - {"manifest.json"}
        for name, digest in files.items():
            assert hashlib.sha256((target / name).read_bytes()).hexdigest() == digest
        card = (target / "README.md").read_text()
        for words in (
            f"mxfp4 weights, layout {layout}",
            "| x | 0.25 |",
            "read by: ",
            "reloaded by",
        ):
            assert words in card
    assert "reloaded by lowbit: 14 weights equal" in capsys.readouterr().out
    again, first = read_quantized(tmp_path / "lowbit"), read_quantized(out)
    for name in first.layers:
        assert torch.equal(again.layers[name].weight.codes, first.layers[name].weight.codes)
    assert main(["export", str(out), str(target), "--layout", "bf16"]) == 0  # over an export
    assert read_mark(target)["layout"] == "bf16" and not (target / "quantization.json").exists()  # type: ignore[index]


BAD = {
    "no-source": (["{tmp}/absent", "{tmp}/new", "--layout", "bf16"], "neither a run nor what"),
    "foreign-source": (["{tmp}/full", "{tmp}/new", "--layout", "bf16"], "neither a run nor what"),
    "full-target": (["{out}", "{tmp}/full", "--layout", "bf16"], "holds other files (mine.txt)"),
    "target-is-a-file": (["{out}", "{tmp}/full/mine.txt", "--layout", "bf16"], "is a file"),
    "format": (["{out}", "{tmp}/new", "--layout", "mxfp8"], "mxfp4 is not mxfp8. These can: "),
    "option": (
        ["{out}", "{tmp}/new", "--layout", "gguf", "--pseudoquant"],
        "has no effect on gguf",
    ),
    "figures": (["{out}", "{tmp}/new", "--layout", "bf16", "--figures", "{tmp}/n"], "no such file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(
    out: Path, tmp_path: Path, capsys: Any, case: str
) -> None:
    arguments, message = BAD[case]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert main(["export", *(word.format(tmp=tmp_path, out=out) for word in arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_source_and_a_bf16_run_are_refused(
    out: Path, fit: Callable[..., int], tmp_path: Path, capsys: Any
) -> None:
    document = out / "quantization.json"
    document.write_text(document.read_text() + " ")
    assert main(["export", str(out), str(tmp_path / "new"), "--layout", "bf16"]) == 2
    assert "quantization.json is not what was written" in capsys.readouterr().err
    assert fit(tmp_path / "run", "bf16", "--trainer.max_steps", "1") == 0
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "new"), "--layout", "gguf"]) == 2
    assert "no weights quantized in its forward pass" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_what_is_read_back_as_something_else_is_not_published(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """One wrong code on its way to the file; the earlier export stays."""
    target = tmp_path / "new"
    command = ["export", str(out), str(target), "--layout", "compressed-tensors"]
    assert main(command) == 0
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    original = verb.write_model

    def wrong(model: Any, *rest: Any, **more: Any) -> Any:
        layer = model.layers["model.layers.0.mlp.up_proj"]
        layer.weight.codes[0, 0] ^= 1
        done = original(model, *rest, **more)
        layer.weight.codes[0, 0] ^= 1
        return done

    monkeypatch.setattr(verb, "write_model", wrong)
    assert main(command) == 2
    assert "reads 1 other values in model.layers.0.mlp.up_proj" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_fused_layers_of_a_run_share_one_tensor_scale(
    fit: Callable[..., int], tmp_path: Path, capsys: Any
) -> None:
    """Its weights are in blocks of 16 x 16, which the layout has as rows of 16."""
    run = tmp_path / "run"
    assert fit(run, "nvfp4", "--trainer.max_steps", "1") == 0
    fused, own = of_run(run, fuse=True), of_run(run, fuse=False)
    assert fused.parted() == [] and len(own.parted()) == 2
    name = "model.layers.0.mlp.down_proj"
    master = AutoModelForCausalLM.from_pretrained(run / "hf").get_submodule(name).weight.detach()
    format = block_format("nvfp4", block_size=(16, 16))
    for model in (fused, own):
        decoded = model.layers[name].weight.dequantize()
        assert torch.equal(decoded, quantize(master, format).dequantize())
    command = ["export", str(run), str(tmp_path / "new"), "--layout", "compressed-tensors"]
    assert main(command) == 0
    assert "7 weights equal the bfloat16 of ours" in capsys.readouterr().out
