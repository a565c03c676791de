"""A resumed run is the run that was never interrupted; what is not that run is refused."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from train.checkpoints.folder import complete_checkpoints, file_digest
from train.runs.record import run_status

Fit = Callable[..., int]
Stop = Callable[..., None]
EVERY = ("--trainer.accumulate_grad_batches", "2", "--checkpoint_every", "1")


def stop(module: Any) -> None:
    signal.raise_signal(signal.SIGTERM)


def test_resume_twice_in_a_row(
    fit: Fit, tmp_path: Path, on_micro_batch: Stop, assert_same_run: Callable[..., None],
    whole_run: Callable[..., Path],
) -> None:  # fmt: skip
    """Stopped in both micro-batches of a step: the accumulation is finished first."""
    whole, parts = whole_run("mxint8", *EVERY), tmp_path / "parts"
    for micro_batch in (2, 7):
        on_micro_batch(micro_batch, stop)
        assert fit(parts, "mxint8", *EVERY) == 143
    on_micro_batch(-1, stop)
    assert fit(parts, "mxint8", *EVERY) == 0
    assert_same_run(parts, whole)


def test_resume_across_an_epoch_boundary(
    fit: Fit, tmp_path: Path, on_micro_batch: Stop, assert_same_run: Callable[..., None]
) -> None:
    """Two and a half steps are an epoch: step 3 holds the end of one and the start of the next."""
    options = (*EVERY, "--data.global_batch_size", "320", "--trainer.max_steps", "4")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert fit(whole, "bf16", *options) == 0
    on_micro_batch(4, stop)
    assert fit(parts, "bf16", *options) == 143
    assert complete_checkpoints(parts / "checkpoints")[-1].name == "step-00000003"
    on_micro_batch(-1, stop)
    assert fit(parts, "bf16", *options) == 0
    assert_same_run(parts, whole)


@pytest.mark.parametrize("micro_batch", [7, 9])
def test_resume_across_a_schedule_switch(
    micro_batch: int,
    fit: Fit,
    tmp_path: Path,
    on_micro_batch: Stop,
    assert_same_run: Callable[..., None],
    whole_run: Callable[..., Path],
) -> None:
    """The recipe ends after 4 of 5 steps; stopped after step 4, and after step 5."""
    options = (*EVERY, "--model.policy.phases", "[{start: 0.8}]", "--trainer.max_steps", "6")
    whole, parts = whole_run("mxint8", *options), tmp_path / "parts"
    on_micro_batch(micro_batch, stop)
    assert fit(parts, "mxint8", *options) == 143
    on_micro_batch(-1, stop)
    assert fit(parts, "mxint8", *options) == 0
    assert_same_run(parts, whole)


def test_grad_accum_changed_same_global_batch(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Of 2 micro-batches a step before step 3, of 4 after: the same windows in each step."""
    from train.model.module import PretrainModule

    run, seen = tmp_path / "run", list[tuple[int, list[int]]]()
    original = PretrainModule.training_step

    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        seen.append((self.trainer.global_step, batch["window"].tolist()))
        return original(self, batch, batch_idx)

    monkeypatch.setattr(PretrainModule, "training_step", step)
    assert fit(tmp_path / "whole", "bf16", *EVERY) == 0
    whole = windows_by_step(seen)
    seen.clear()
    assert fit(run, "bf16", *EVERY, "--trainer.max_steps", "3") == 0
    assert fit(run, "bf16", *EVERY, "--trainer.accumulate_grad_batches", "4") == 0
    assert windows_by_step(seen) == whole
    assert len(seen) == 3 * 2 + 3 * 4
    assert "data from sample 24 on" in capsys.readouterr().out


def windows_by_step(seen: list[tuple[int, list[int]]]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for step, windows in seen:
        found.setdefault(step, []).extend(windows)
    return found


def test_resume_a_finished_run(fit: Fit, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    assert fit(run, "bf16", *EVERY) == 0
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != "lock"}
    assert fit(run, "bf16", *EVERY) == 0
    assert "is finished: nothing to do" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != "lock"} == before


def test_going_back_leaves_the_later_checkpoints_behind(
    fit: Fit, tmp_path: Path, assert_same_run: Callable[..., None], whole_run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """They are of another past than the one that is now made; the one loaded is hashed once."""
    hashed: list[str] = []

    def counted(path: Path) -> str:
        hashed.append(f"{path.parent.name}/{path.name}")
        return file_digest(path)

    monkeypatch.setattr("train.checkpoints.folder.file_digest", counted)
    whole, run = whole_run("bf16", *EVERY, "--keep_checkpoints", "3"), tmp_path / "run"
    shutil.copytree(whole, run)
    point = run / "checkpoints" / "step-00000004"
    assert fit(run, "bf16", *EVERY, "--resume", str(point)) == 0
    assert hashed.count("step-00000004/state.ckpt") == 1
    aside = {p.name for p in (run / "checkpoints").glob("*.superseded")}
    assert aside == {"step-00000005.superseded", "step-00000006.superseded"}
    assert_same_run(run, whole)


def test_all_checkpoints_bad_is_an_error(fit: Fit, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    assert fit(run, "bf16", *EVERY, "--trainer.max_steps", "3") == 0
    for path in complete_checkpoints(run / "checkpoints"):
        (path / "state.ckpt").write_bytes(b"")
    for _ in range(2):
        assert fit(run, "bf16", *EVERY) == 2
        assert "no undamaged checkpoint is left" in capsys.readouterr().err
    assert run_status(run) == "finished"


def test_other_recipe_or_other_data_is_refused(fit: Fit, tmp_path: Path, capsys: Any) -> None:
    """By what the checkpoint itself says, with no config.yaml beside it."""
    run = tmp_path / "run"
    assert fit(run, "bf16", *EVERY, "--trainer.max_steps", "1") == 0
    (point,) = complete_checkpoints(run / "checkpoints")
    alone = tmp_path / "alone" / "checkpoints" / point.name
    alone.parent.mkdir(parents=True)
    point.rename(alone)
    assert fit(tmp_path / "new", "mxint8", *EVERY, "--resume", str(alone)) == 2
    assert "its recipe is" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    manifest = alone / "manifest.json"
    import train.checkpoints.folder as checkpoint

    changed = json.loads(manifest.read_bytes())
    del changed["digest"]
    changed["origin"]["data_fingerprint"] = "0" * 64
    manifest.write_bytes(checkpoint._encode(changed))
    assert fit(tmp_path / "new", "bf16", *EVERY, "--resume", str(alone)) == 2
    assert "its data_fingerprint is" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
