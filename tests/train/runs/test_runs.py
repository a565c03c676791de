"""Run folders are read at full precision, and what is wrong with one is named."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from train.runs.casts import CastGap, read_cast_gaps, write_cast_gaps
from train.runs.run import ema, read_run, read_runs

Make = Callable[..., Path]


def test_metrics_are_read_at_full_precision(tmp_path: Path, make_run: Make) -> None:
    losses = [8.1, 1 / 3, math.nextafter(0.1, 1), 5e-324]
    run = read_run(make_run(tmp_path / "a", losses, {2: math.pi}))
    assert run.metrics["train/loss"].tolist() == losses
    assert [v.tolist() for v in run.val_curve] == [[64.0], [math.pi]]
    assert run.tokens == 128 and run.tokens_per_second == 1002.5


def test_ema_starts_at_the_first_value() -> None:
    assert ema([1.0, 2.0, 4.0], 0.5).tolist() == [1.0, 1.5, 2.75]


def test_nonfinite_steps_stay_out_of_the_smoothed_curve(tmp_path: Path, make_run: Make) -> None:
    run = read_run(make_run(tmp_path / "a", [2.0, math.nan, 2.0], {}))
    assert run.train_curve[0].tolist() == [32.0, 96.0] and run.status == "finished"
    end = read_run(make_run(tmp_path / "b", [2.0, math.inf], {}))
    assert end.status == "diverged"


def test_windows_line_ends_and_no_last_line_end(tmp_path: Path, make_run: Make) -> None:
    folder = make_run(tmp_path / "a", [2.0, 1.0], {1: 3.0})
    text = (folder / "metrics.csv").read_text()
    (folder / "metrics.csv").write_bytes(text.rstrip("\n").replace("\n", "\r\n").encode())
    run = read_run(folder)
    assert run.metrics["train/loss"].tolist() == [2.0, 1.0]
    assert np.isnan(run.metrics["val/perplexity"]).tolist() == [False, True]


def test_a_half_written_row_of_an_unfinished_run_is_no_row(tmp_path: Path, make_run: Make) -> None:
    folder = make_run(tmp_path / "a", [2.0, 1.0], {}, status="running", max_steps=9)
    with (folder / "metrics.csv").open("a") as file:
        file.write("3,9")
    assert read_run(folder).metrics["step"].tolist() == [1.0, 2.0]


def test_a_run_that_failed_before_its_first_step_is_a_run(tmp_path: Path, make_run: Make) -> None:
    folder = make_run(tmp_path / "a", [], {}, status="failed", max_steps=9)
    assert read_run(folder).tokens == 0
    (folder / "metrics.csv").unlink()
    assert read_run(folder).tokens == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version is 2, this lowbit reads 1"),
        ({"status": "done"}, "'done' is none of running, finished, diverged, failed"),
        ({"data": {"seq_len": 8}}, "lacks fingerprint, global_batch_size"),
    ],
)
def test_run_json_is_checked(tmp_path: Path, make_run: Make, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_run(make_run(tmp_path / "a", [1.0], {}, **change))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step,tokens_seen\n1,32\n", "lacks the column train/loss"),
        ("step,tokens_seen,train/loss\n1,32,oops\n", "metrics.csv: could not convert"),
        ("step,tokens_seen,train/loss\n1,32\n", "3 columns in its header, 2 in its rows"),
        ("step,tokens_seen,train/loss\n2,64,1\n2,64,1\n", "do not increase"),
    ],
)
def test_metrics_are_checked(tmp_path: Path, make_run: Make, text: str, message: str) -> None:
    folder = make_run(tmp_path / "a", [1.0], {})
    (folder / "metrics.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_run(folder)


def test_missing_and_broken_folders(tmp_path: Path, make_run: Make) -> None:
    with pytest.raises(FileNotFoundError, match="no such run folder"):
        read_runs([tmp_path / "nothing"])
    with pytest.raises(FileNotFoundError, match=r"no run\.json"):
        read_runs([tmp_path])
    (make_run(tmp_path / "a", [1.0], {}) / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is not JSON"):
        read_runs([tmp_path / "a"])


def test_a_sweep_expands_with_the_baseline_first(tmp_path: Path, make_run: Make) -> None:
    for label, seed in (("mxint8", 10), ("a-bf16-noise", 2), ("bf16", 10), ("bf16", 2)):
        control = {"control": "1e-6"} if "noise" in label else {}
        recipe = "bf16" if "bf16" in label else label
        folder = tmp_path / f"{label}-s{seed}"
        make_run(folder, [1.0], {}, recipe=recipe, seed=seed, **control)
    (tmp_path / "compare").mkdir()
    found = [run.path.name for run in read_runs([tmp_path])]
    assert found == ["bf16-s2", "bf16-s10", "a-bf16-noise-s2", "mxint8-s10"]


def test_labels_keep_runs_apart(
    tmp_path: Path, make_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("new/bf16-s0", "golden/bf16-s0", "one", "two", "new/bf16-b16-s0"):
        make_run(tmp_path / folder, [1.0], {})
    monkeypatch.chdir(tmp_path)

    def labels(*folders: str) -> list[str]:
        return [run.label for run in read_runs([Path(folder) for folder in folders])]

    assert labels("new/bf16-s0", "new/bf16-b16-s0") == ["bf16", "bf16-b16"]
    assert labels("new/bf16-s0", "golden/bf16-s0") == ["new/bf16", "golden/bf16"]
    assert labels("one", "two") == ["one", "two"]
    with pytest.raises(ValueError, match="given more than once: one"):
        labels("one", f"one{os.sep}.")


def test_cast_gaps_come_back_as_written(tmp_path: Path) -> None:
    assert read_cast_gaps(tmp_path) == {}
    gaps = {"mxint8": CastGap(1 / 3, 0.1, 4, 32), "mxfp8": CastGap(0.2, 0.1, 4, 32, kl=0.01)}
    write_cast_gaps(tmp_path, gaps)
    assert read_cast_gaps(tmp_path) == gaps
    (tmp_path / "cast_gap.json").write_text(json.dumps({"mxint8": {"mean": 1.0}}))
    with pytest.raises(ValueError, match=r"cast_gap.json: mxint8 lacks"):
        read_cast_gaps(tmp_path)
