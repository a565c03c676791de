"""`lowbit eval MODEL... --against`: quantized models and exports beside their baseline."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from lowbit import quantize
from train.cli import main
from train.export.folder import put, seal, staging
from train.export.layouts import LAYOUTS, write_model
from train.quantized.layout import StoredLayer
from train.quantized.model import QuantizedModel, linear_names, plain_config


@pytest.fixture
def out(tiny_model: Path, tmp_path: Path) -> Path:
    """tiny_model in mxfp4, as `lowbit quantize` leaves it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    state, layers = dict(model.state_dict()), {}
    for name in linear_names(model)[:-1]:
        layers[name] = StoredLayer(quantize(state.pop(f"{name}.weight"), "mxfp4"))
    quantized = QuantizedModel("tiny", plain_config(model), layers, state)
    with staging(tmp_path / "out") as place:
        digests, _ = write_model(quantized, LAYOUTS["lowbit"], place, pseudo=False)
        seal(place, digests, {"layout": "lowbit"})
        put(place, tmp_path / "out")
    return tmp_path / "out"


def test_what_quantize_left_is_judged_as_a_cast_is_and_its_exports_beside_it(
    out: Path, tiny_model: Path, text: Path, tmp_path: Path, capsys: Any
) -> None:
    """Rounding to nearest is what a cast of the weights does: the same KL to the last digits."""
    folders = []
    for layout in ("compressed-tensors", "gguf", "bf16", "fp_quant"):
        folders.append(str(tmp_path / layout))
        assert main(["export", str(out), folders[-1], "--layout", layout]) == 0
    command = ["eval", str(out), *folders, "--against", str(tiny_model), "--formats", "mxfp4"]
    command += ["--weight-only", "--tokenizer", "bytes", "--text", str(text), "--windows", "3"]
    assert main([*command, "--seq-len", "64", "--out", str(tmp_path / "eval")]) == 0
    document = json.loads((tmp_path / "eval" / "eval.json").read_text())
    rows = {row["format"]: row for row in document["rows"]}
    assert list(rows) == ["bf16", "mxfp4", str(out), *folders]
    assert rows["bf16"]["KL"] == 0 < rows["mxfp4"]["KL"]
    assert rows[str(out)]["KL"] == pytest.approx(rows["mxfp4"]["KL"], rel=1e-6)
    for folder in folders:  # the tensors that stay are BF16 there
        assert rows[folder]["KL"] == pytest.approx(rows["mxfp4"]["KL"], rel=0.02)
        gap = rows[folder]["KL"] - rows[str(out)]["KL"]
        assert rows[folder]["KL - first"] == pytest.approx(gap, abs=1e-9)
    printed = capsys.readouterr().out
    for words in ("read by transformers", "± paired", "(lowbit)"):
        assert words in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["{m}"], "give --formats to cast one MODEL into, or --against"),
        (["{m}", "{m}", "--formats", "mxfp4"], "give --formats to cast one MODEL into"),
        (["{m}", "--against", "{m}", "--weight-only"], "no effect without --formats"),
        (["{absent}", "--against", "{m}"], "no such model"),
    ],
)
def test_bad_input_is_one_line(
    options: list[str], message: str, tiny_model: Path, text: Path, tmp_path: Path, capsys: Any
) -> None:
    words = [word.format(m=tiny_model, absent=tmp_path / "absent") for word in options]
    rest = ["--tokenizer", "bytes", "--text", str(text), "--windows", "2", "--seq-len", "16"]
    assert main(["eval", *words, *rest]) == 2
    assert message in capsys.readouterr().err
