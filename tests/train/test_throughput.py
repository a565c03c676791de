"""Where the time of a step goes: each second is counted in one phase."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from train import throughput
from train.throughput import StepTimes

Fit = Callable[..., int]


def test_a_phase_does_not_hold_those_inside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 3.0, 7.0, 12.0])
    monkeypatch.setattr(throughput, "_now", lambda: next(clock))
    times = StepTimes()
    with times.profile("[LightningModule]PretrainModule.optimizer_step"):
        with times.profile("[Strategy]DDPStrategy.training_step"), times.profile("other"):
            pass
        with times.profile("[Strategy]DDPStrategy.backward"):
            pass
    assert times.take() == {"forward": 2.0, "backward": 4.0, "optimizer": 6.0}
    assert times.take() == {}


def test_a_run_records_its_throughput(fit: Fit, tmp_path: Path) -> None:
    assert fit(tmp_path / "run", "bf16", "--trainer.max_steps", "12") == 0
    found = json.loads((tmp_path / "run/run.json").read_text())["throughput"]
    phases = {name for name in found if name.startswith("seconds/")}
    assert phases == {f"seconds/{name}" for name in ("data", "forward", "backward", "optimizer")}
    assert all(found[name] > 0 for name in phases)
    assert found["steps"] == 2  # the first, to have one of a short run, and the tenth
    assert found["tokens_per_second"] == found["tokens_per_second_per_device"]
    assert found["peak_memory"] > 2**20
