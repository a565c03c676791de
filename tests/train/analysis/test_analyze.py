"""`lowbit analyze` against the operands that the quantized layer itself would see."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lowbit import (
    Rotation,
    block_format,
    crest_factor,
    fake_quantize,
    qsnr_db,
    rotate,
)
from lowbit.stats import underflow_share
from train.analysis.analyze import win_table
from train.analysis.operands import Look, look_at
from train.cli import main


@pytest.fixture
def command(tiny_model: Path, text: Path, tmp_path: Path) -> list[str]:
    options = ["--tokenizer", "bytes", "--seq-len", "96", "--out", str(tmp_path / "out")]
    return ["analyze", str(tiny_model), "--text", str(text), *options]


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_all_six_operands_are_those_of_the_quantized_layer(
    command: list[str], tiny_model: Path, text: Path, tmp_path: Path
) -> None:
    assert main([*command, "--formats", "mxint8", "mxfp8"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    layer, seen = model.get_submodule("model.layers.1.mlp.down_proj"), {}

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        seen.update(x=inputs[0].detach(), y=output)

    layer.register_forward_hook(keep)
    data = text.read_bytes() + b"\n"
    start = (len(data) - 97) // 2
    ids = torch.tensor(list(data[start : start + 97]))
    F.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:]).backward()
    x, gradient, weight = seen["x"][0], seen["y"].grad[0], layer.weight.detach()
    operands = {
        "fprop_input": (x, 1), "fprop_weight": (weight, 1), "dgrad_grad_output": (gradient, 1),
        "dgrad_weight": (weight, 0), "wgrad_grad_output": (gradient, 0), "wgrad_input": (x, 0),
    }  # fmt: skip
    found = {
        (row["operand"], row["format"]): row
        for row in _rows(tmp_path / "out/qsnr.csv")
        if row["layer"] == "model.layers.1.mlp.down_proj"
    }
    assert len(found) == 12
    for operand, (x, dim) in operands.items():
        for name in ("mxint8", "mxfp8"):
            row, q = found[operand, name], fake_quantize(x, name, dim)
            assert float(row["qsnr_db"]) == pytest.approx(float(qsnr_db(x, q)), abs=1e-3)
            assert float(row["crest"]) == pytest.approx(float(crest_factor(x, 32, dim).nanmean()))
            assert float(row["underflow"]) == pytest.approx(float(underflow_share(x, q)))


def test_every_file_is_written_and_layers_are_counted(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = ["--layers", "*mlp*", "--rotations", "none", "block"]
    assert main([*command, "--formats", "nvint4", "nvfp4", *layers]) == 0
    out = tmp_path / "out"
    rows = _rows(out / "qsnr.csv")
    assert len(rows) == 2 * 3 * 6 * 2 * 2  # blocks, layers, operands, formats, rotations
    assert len(_rows(out / "crest.csv")) == 2 * 3 * 6 * 3 * 2
    assert {row["type"] for row in rows} == {"gate_proj", "up_proj", "down_proj"}
    assert {row["depth"] for row in rows} == {"0", "1"}
    tables = json.loads((out / "analyze.json").read_text())["tables"]
    assert len(tables) == 5
    page = (out / "analyze.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "http" not in page
    assert "6 linear layers" in capsys.readouterr().out


@pytest.mark.slow
def test_stochastic_gradients_pass_the_1_over_b_test(command: list[str], tmp_path: Path) -> None:
    """E8M0 scales that round up leave no bias; rounding to nearest is one draw's level."""
    layers = [
        "--layers",
        "*0.mlp.down_proj",
        "--formats",
        "mxfp4",
        "mxint8",
        "--unbiasedness",
        "32",
    ]
    assert main([*command, *layers]) == 0
    rows = _rows(tmp_path / "out/unbiasedness.csv")
    assert len(rows) == 2 * 2 * (6 + 1)  # formats, gradients, B = 1 .. 32 and nearest
    document = json.loads((tmp_path / "out/analyze.json").read_text())
    [table] = [rows for title, rows in document["tables"].items() if "1/B" in title]
    found = {(row["format"], row["rounding"], row["gradient"]): row for row in table}
    assert len(found) == 8
    for (_, rounding, _), row in found.items():
        assert row["verdict"] == ("unbiased" if rounding == "stochastic" else "biased")
        assert row["slope"] == (pytest.approx(-1, abs=0.1) if rounding == "stochastic" else 0)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_rotation_is_along_the_blocked_axis(dim: int) -> None:
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * 1e-25
    [row] = look_at(x, dim, Look((block_format("nvfp4"),), ("block",))).qsnr
    turned = rotate(x, Rotation(16), dim)
    expected = float(qsnr_db(turned, fake_quantize(turned, "nvfp4", dim)))
    assert row["qsnr_db"] == pytest.approx(expected, abs=1e-3)  # squares would underflow in FP32


def test_wins_are_counted_tensor_by_tensor() -> None:
    values = {"mxint8": [40.0, 30.0, 41.0, 42.0], "mxfp8": [31.0, 31.0, 31.0, 31.0]}
    rows = [
        {"rotation": "none", "format": name, "qsnr_db": value}
        for name, column in values.items()
        for value in column
    ]
    [row] = win_table(rows)
    assert (row["integer"], row["float"], row["integer wins %"]) == (38.25, 31.0, 75.0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--layers", "nothing*"], "'nothing*' matches no linear layer"),
        (["--rotations", "8"], "--rotations 8"),
        (["--formats", "int8", "--rotations", "block"], "no block size"),
        (["--unbiasedness", "12"], "--unbiasedness 12: a power of two"),
    ],
)
def test_bad_input_is_one_line(
    command: list[str], more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *more]) == 2
    assert message in capsys.readouterr().err
