"""`lowbit search`: the grid, the ranking, a search that is stopped and goes on."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lowbit import BlockFormat, block_format, fake_quantize, qsnr_db
from train.analysis import search
from train.analysis.search_grid import grid
from train.analysis.theory import samples
from train.cli import main

FEW = ("mxint4", "nvfp4", "nvint4", "e2m1_ue5m3", "mxfp4_b16", "mxint8")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[BlockFormat]:
    """A grid of a second."""
    formats = [block_format(name) for name in FEW]
    monkeypatch.setattr(search, "grid", lambda bits: formats)
    monkeypatch.setattr(search, "NAMED", ())
    monkeypatch.setattr(search, "SAMPLE", 2048)
    return formats


def test_the_grid_has_hundreds_within_the_budget_each_once() -> None:
    formats = grid(4.5)
    own = [format for format in formats if 3.5 < format.bits_per_value <= 4.5]
    assert len(own) >= 300 and len({*map(str, formats)}) == len({*formats}) == len(formats)
    for name in ("mxint4", "nvfp4(scale_rule=four_over_six)", "nvint4(scale_rule=best)"):
        assert name in map(str, own)


def test_a_row_is_the_mean_over_tensors_each_under_its_own_scale(few: list[BlockFormat]) -> None:
    x = samples("student-t 4", 2**14, 0).reshape(8, -1)
    x *= torch.logspace(-3, 3, 8)[:, None]
    for format in few:
        wanted = [float(qsnr_db(row, fake_quantize(row, format))) for row in x]
        row = search.measured(format, x)
        assert row["qsnr_db"] == pytest.approx(sum(wanted) / 8, abs=1e-9)
        assert row["bits"] == format.bits_per_value


def test_the_front() -> None:
    rows: list[dict[str, Any]] = [
        {"bits": bits, "qsnr_db": db} for bits, db in ((4, 20), (4, 21), (4.5, 21), (5, 22), (3, 9))
    ]
    search.mark_front(rows)
    assert [row["pareto"] for row in rows] == [False, True, False, True, True]


def test_a_stopped_search_goes_on_and_is_the_search(
    few: list[BlockFormat], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["search", "gaussian", "--out", str(whole)]) == 0
    assert "6 formats on gaussian, seed 0" in capsys.readouterr().out
    measured, seen = search.measured, list[str]()

    def stopping(format: BlockFormat, tensors: torch.Tensor) -> Any:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(str(format))
        return measured(format, tensors)

    def counting(format: BlockFormat, tensors: torch.Tensor) -> Any:
        seen.append(str(format))
        return measured(format, tensors)

    monkeypatch.setattr(search, "measured", stopping)
    assert main(["search", "gaussian", "--out", str(parts)]) == 130
    with (parts / "search.jsonl").open("a") as file:
        file.write('{"format": "mxi')  # of a write that was cut short
    monkeypatch.setattr(search, "measured", counting)
    assert main(["search", "gaussian", "--out", str(parts)]) == 0
    assert sorted(seen) == sorted(map(str, few))  # none twice
    for name in ("search.csv", "search.json", "search.svg"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    capsys.readouterr()
    assert main(["search", "gaussian", "--seed", "1", "--out", str(parts)]) == 2
    assert "holds a search of another subject" in capsys.readouterr().err
    monkeypatch.undo()
    for bad in (["--bits", "nan"], ["--bits", "1"], ["--top", "-1"]):
        assert main(["search", "gaussian", *bad, "--out", str(tmp_path / "bad")]) == 2
    assert not (tmp_path / "bad").exists()


def test_a_models_operands(few: list[BlockFormat], tmp_path: Path, capsys: Any) -> None:
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 128)
    heads = {"num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 257}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(200)))
    texts = ["--text", str(tmp_path / "text.txt"), "--tokenizer", "bytes"]
    command = ["search", str(tmp_path / "model"), *texts, "--bits", "4.5", "--top", "2"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "mean QSNR over 42 tensors" in out  # of 7 layers
    rows = list(csv.DictReader((tmp_path / "out/search.csv").read_text().splitlines()))
    assert rows[0]["format"] == "mxint8"  # beyond the budget
    assert [bool(row["KL"]) for row in rows] == [False, True, True, False, False, False]
    assert json.loads((tmp_path / "out/search.json").read_text())["search"]["sample"] == [2048, 128]
    assert (tmp_path / "out/search.png").stat().st_size > 10_000
