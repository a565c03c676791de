"""A checkpoint of format version 1, kept as it was written, goes on under today's program."""

import csv
from pathlib import Path

import pytest

from lowbit import bf16
from train.cli import main

GOLDEN = Path(__file__).parent / "golden"
LOSSES = {"train/loss": 5.456235, "val/loss": 5.439642}  # of step 2, when step 1 was saved


def test_version_1_resumes(
    tiny_data: Path, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    point = GOLDEN / "step-00000001"
    layers = ["-c", str(GOLDEN / "run.yaml"), "-c", str(recipes / "bf16.yaml")]
    place = ["--data.path", str(tiny_data), "--run_dir", str(tmp_path / "run")]
    with bf16.using("native"):  # as it was, before there was a choice
        assert main(["fit", *layers, *place, "--resume", str(point)]) == 0
    assert "resumed after step 1: weights restored, optimizer" in capsys.readouterr().out
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    for name, loss in LOSSES.items():
        assert float(row[name]) == pytest.approx(loss, rel=1e-4)  # BF16 on another CPU
