"""A signal stops a run at a step's end with a checkpoint, and the run goes on bit for bit."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from train.checkpoints.folder import complete_checkpoints
from train.fit.signals import StopRequest, requeue
from train.runs.record import run_status
from train.runs.run import read_runs

Fit = Callable[..., int]
STEPS = ("--trainer.accumulate_grad_batches", "2", "--checkpoint_every", "99")


def raise_signal(number: int) -> Callable[[Any], None]:
    return lambda module: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)]
)
def test_sigterm_one_process(
    number: int,
    code: int,
    fit: Fit,
    tmp_path: Path,
    on_micro_batch: Callable[..., None],
    assert_same_run: Callable[..., None],
    whole_run: Callable[..., Path],
) -> None:
    """Sent in the first micro-batch of step 3: the step is finished, and no other begun."""
    whole, parts = whole_run("mxint8", *STEPS), tmp_path / "parts"
    on_micro_batch(4, raise_signal(number))
    assert fit(parts, "mxint8", *STEPS) == code
    assert [p.name for p in complete_checkpoints(parts / "checkpoints")] == ["step-00000003"]
    assert run_status(parts) == "running"
    on_micro_batch(-1, raise_signal(number))
    assert fit(parts, "mxint8", *STEPS) == 0
    assert_same_run(parts, whole)


@pytest.mark.parametrize("moment", ["training_step", "validation_step"])
def test_a_stop_does_not_wait_for_validation(
    moment: str,
    fit: Fit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    assert_same_run: Callable[..., None],
    whole_run: Callable[..., Path],
) -> None:
    """Step 3 validates: the resumed run begins with that validation."""
    from train.model.module import PretrainModule

    options = (*STEPS, "--trainer.val_check_interval", "3", "--data.global_batch_size", "4")
    whole, parts = whole_run("mxint8", *options), tmp_path / "parts"
    original, validated = getattr(PretrainModule, moment), []

    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        validated.append(moment == "validation_step")
        if moment == "validation_step" or batch_idx == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainModule, moment, step)
        assert fit(parts, "mxint8", *options) == 143
    assert sum(validated) == (moment == "validation_step")  # of two batches
    assert [p.name for p in complete_checkpoints(parts / "checkpoints")] == ["step-00000003"]
    assert fit(parts, "mxint8", *options) == 0
    assert_same_run(parts, whole)


def test_a_stop_before_the_last_validation(
    fit: Fit, tmp_path: Path, on_micro_batch: Callable[..., None]
) -> None:
    """No step is left to take: the resumed run is that validation alone."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = (*STEPS, "--trainer.max_steps", "3", "--trainer.val_check_interval", "3")
    assert fit(whole, "mxint8", *options) == 0
    on_micro_batch(5, raise_signal(signal.SIGTERM))
    assert fit(parts, "mxint8", *options) == 143
    on_micro_batch(-1, raise_signal(signal.SIGTERM))
    assert fit(parts, "mxint8", *options) == 0
    assert run_status(parts) == "finished"
    runs = read_runs([whole, parts])
    for name in ("train/loss", "val/loss"):
        assert [*runs[0].metrics[name]] == pytest.approx(
            [*runs[1].metrics[name]], abs=0, nan_ok=True
        )
    assert runs[1].metrics["val/loss"][-1] > 0


def test_validation_counts_steps_not_micro_batches(
    fit: Fit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    assert_same_run: Callable[..., None],
) -> None:
    """An interval of 3 with 2 micro-batches a step: the first validation is after step 3."""
    from train.model.module import PretrainModule

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert fit(whole, "bf16", *STEPS) == 0
    original = PretrainModule.validation_step

    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainModule, "validation_step", step)
        assert fit(parts, "bf16", *STEPS) == 143
    assert [p.name for p in complete_checkpoints(parts / "checkpoints")] == ["step-00000003"]
    assert fit(parts, "bf16", *STEPS) == 0
    assert_same_run(parts, whole)


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


@pytest.mark.slow
def test_a_second_sigint_stops_at_once() -> None:
    code = (
        "import os, signal\nfrom train.fit.signals import StopRequest\n"
        "with StopRequest() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGINT); print(stop.signum, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT); print('still here', flush=True)\n"
    )
    ended = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert (ended.stdout, ended.returncode) == ("2\n", -signal.SIGINT)


@pytest.mark.parametrize(
    ("environment", "asked"),
    [
        ({"SLURM_JOB_ID": "17"}, "requeue 17"),
        ({"SLURM_JOB_ID": "18", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"},
         "requeue 17_3"),
        ({}, None),
    ],
)  # fmt: skip
def test_slurm_requeue_needs_no_shell(
    environment: dict[str, str], asked: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake_scontrol(tmp_path, monkeypatch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    requeue()
    called = tmp_path / "called"
    assert (called.read_text().strip() if called.exists() else None) == asked


def test_a_slurm_job_id_is_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_scontrol(tmp_path, monkeypatch)
    monkeypatch.setenv("SLURM_JOB_ID", "1; touch /tmp/sentinel")
    with pytest.raises(ValueError, match="not a number"):
        requeue()
    assert not (tmp_path / "called").exists()


def _fake_scontrol(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = folder / "scontrol"
    script.write_text(f'#!/bin/sh\necho "$@" > {folder}/called\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.slow
def test_launcher_sigkilled(tmp_path: Path) -> None:
    """A worker whose parent is gone ends by itself."""
    worker = (
        "import os, time\nfrom train.fit.signals import end_with_launcher\n"
        "end_with_launcher(0.05)\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n"
    )
    launcher = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-P', '-c', {worker!r}])\ntime.sleep(60)\n"
    )
    environment = os.environ | {"LOCAL_RANK": "1"}
    agent = subprocess.Popen(
        [sys.executable, "-P", "-c", launcher], stdout=subprocess.PIPE, env=environment
    )
    assert agent.stdout is not None
    with agent.stdout:
        pid = int(agent.stdout.readline())
        agent.kill()
        agent.wait()
        deadline = time.monotonic() + 30
        while _alive(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # nobody may be there to collect it
