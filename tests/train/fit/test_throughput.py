"""Where the time of a step goes: each second is counted in one phase."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from train.fit import throughput
from train.fit.communication import communication_seconds
from train.fit.throughput import StepTimes

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


def event(name: str, start: int, end: int, device: str = "CPU") -> Any:
    """As the profiler has them; seconds."""
    found = {"name": name, "start_ns": start * 10**9, "end_ns": end * 10**9}
    return SimpleNamespace(
        device_type=lambda: SimpleNamespace(name=device),
        **{key: lambda value=value: value for key, value in found.items()},
    )


def test_communication_is_exposed_where_nothing_is_computed() -> None:
    """Of two collectives that overlap, 1 to 7, and one from 8 to 9; computed is in 2-3 and 5-6."""
    waits = ("autograd::engine::evaluate_function: Backward", "c10d::allreduce_", "Optimizer.step")
    cpu = [event(name, 0, 9) for name in waits]
    cpu += [event("gloo:all_reduce", *times) for times in ((1, 5), (3, 7), (8, 9))]
    cpu += [event("aten::mm", 2, 3), event("aten::t", 2, 3), event("lowbit::quantize", 5, 6)]
    names = ("AllReduce_Sum_f32_RING_LL", "AllGather_RING_LL", "ReduceScatter_Sum_f32_RING_LL")
    spans = zip(names, ((1, 5), (3, 7), (8, 9)), strict=True)
    gpu = [event(f"ncclDevKernel_{name}(args)", *times, "CUDA") for name, times in spans]
    gpu += [event("gemm", 2, 3, "CUDA"), event("Memcpy DtoD (Device -> Device)", 5, 6, "CUDA")]
    gpu += [event("cudaDeviceSynchronize", 0, 9)]
    expected = {"communication": 7.0, "communication_exposed": 5.0}
    assert communication_seconds(cpu, on_device=False) == expected
    assert communication_seconds(gpu, on_device=True) == expected
