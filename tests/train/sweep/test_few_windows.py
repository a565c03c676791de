"""A corpus without a validation split, or with a window or two of it: said, never in the way."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data.prepare import prepare
from data.request import PrepareRequest
from data.shards import Manifest
from train.cli import main
from train.runs.casts import read_cast_gaps, write_cast_gaps
from train.sweep.casts import cast_gaps
from train.sweep.units import BranchPoint

Fit = Callable[..., int]


def corpus(folder: Path, windows: int) -> Path:
    """Tokens of which so many windows of 32 are held out."""
    folder.mkdir()
    for index in range(50):
        (folder / f"{index}.txt").write_text(f"{index} times two is {2 * index}. " * 2)
    for size in range(50):
        out = folder / f"tokens{size}"
        held_out = 0.0 if not windows else 0.02 * (size + 1)
        text = (f"{folder}/*.txt",)
        prepare(out, PrepareRequest(text=text, tokenizer="bytes", val_fraction=held_out))
        if max(Manifest.load(out).val.tokens - 1, 0) // 32 >= windows:
            return out
    raise AssertionError


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")  # it is
@pytest.mark.parametrize("windows", [0, 1, 2])
def test_a_sweep_of_few_validation_windows(
    fit: Fit, tmp_path: Path, windows: int, capsys: pytest.CaptureFixture[str]
) -> None:
    data = corpus(tmp_path / "corpus", windows)
    runs = [tmp_path / "runs" / name for name in ("bf16", "mxint8")]
    own = ["--data.path", str(data), "--data.val_windows", "null"]
    for run in runs:
        assert fit(run, run.name, *own, "--trainer.max_steps", "2") == 0
    found = cast_gaps(runs[0], runs)
    if not windows:
        assert found == {}
        assert "no validation split" in capsys.readouterr().out
        with pytest.raises(ValueError, match="prepared without a validation split"):
            BranchPoint.read(runs[0] / "checkpoints" / "step-00000002")
    else:
        write_cast_gaps(runs[0], found)
        gap = read_cast_gaps(runs[0])["mxint8"]
        assert (gap.windows, gap.standard_error) == (Manifest.load(data).val.tokens // 32, None)
        assert "NaN" not in (runs[0] / "cast_gap.json").read_text()
    assert main(["compare", str(tmp_path / "runs")]) == 0
    rows = json.loads((tmp_path / "runs" / "compare" / "compare.json").read_text())["runs"]
    assert [row["cast_gap"] is None for row in rows] == [not windows] * 2
    assert (rows[1]["gap"] is None) == (not windows)
