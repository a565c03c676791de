"""`lowbit theory`: what it prints and leaves behind."""

import csv
import json
from pathlib import Path

import pytest

from train.cli import main


def test_theory_writes_curves_table_and_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["theory", "--formats", "mxint8", "mxfp8", "nvfp4", "--samples", "65536"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for digits in ("7.55", "1.96", "2.04", "2.39", "7.484", "2.151"):
        assert digits in printed
    document = json.loads((tmp_path / "out/theory.json").read_text())
    gaussian = {r["format"]: r for r in document["measured"] if r["data"] == "gaussian"}
    assert gaussian["mxint8"]["measured dB"] == pytest.approx(41.61, abs=0.1)  # paper.md 1.5 [D]
    assert gaussian["mxfp8"]["measured dB"] == pytest.approx(31.52, abs=0.1)
    with (tmp_path / "out/theory.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["crest", "mxint8", "mxfp8", "nvfp4"]
    assert (tmp_path / "out/theory.png").read_bytes()[1:4] == b"PNG"
    assert (tmp_path / "out/theory.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rho", "3"], "--rho 3.0"),
        (["--formats", "mxint9"], "unknown block format 'mxint9'"),
        (["--formats", "mxint8", "mxint8"], "more than once: mxint8"),
        (["--samples", "5"], "--samples 5"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["theory", *arguments]) == 2
    assert message in capsys.readouterr().err
