"""How fast a run is, and where the time of its steps goes."""

import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.profilers import Profiler
from torch import Tensor

from train.flops import device_peak, flops_per_token
from train.module import PretrainModule
from train.record import update_record

# the last part of Lightning's name of an action -> what we call it
PHASES = {
    "train_dataloader_next": "data",
    "training_step": "forward",
    "backward": "backward",
    "optimizer_step": "optimizer",
}
EVERY = 10  # steps: a device is waited for at each phase's end, which costs a little


class StepTimes(Profiler):
    """Seconds in each phase without those inside it; an optimizer step holds forward and backward.

    Backward includes the communication that it could not hide.
    """

    def __init__(self) -> None:
        super().__init__()
        self.on = True
        self._began: list[tuple[str, float]] = []
        self._seconds: dict[str, float] = defaultdict(float)

    def start(self, action_name: str) -> None:
        if self.on and (phase := PHASES.get(action_name.rpartition(".")[2])):
            self._began.append((phase, _now()))

    def stop(self, action_name: str) -> None:
        phase = PHASES.get(action_name.rpartition(".")[2])
        if not self._began or self._began[-1][0] != phase:
            return
        _, began = self._began.pop()
        taken = _now() - began
        self._seconds[phase] += taken
        for outer, _ in self._began[-1:]:
            self._seconds[outer] -= taken

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


class Throughput(Callback):
    """To TensorBoard every EVERY steps, to run.json at the end: medians over the looked-at steps.

    tokens/s per device and in all, seconds by phase, the share of the device's BF16 peak (model
    FLOPs utilisation, where the peak is known), peak memory of this rank in bytes: the
    accelerator's tensors, or the process where there is none.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._rows: list[dict[str, float]] = []

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._began = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        module: LightningModule,
        outputs: Any,
        batch: Mapping[str, Tensor],
        batch_idx: int,
    ) -> None:
        assert isinstance(module, PretrainModule)
        accumulation, times = trainer.accumulate_grad_batches, trainer.profiler  # type: ignore[attr-defined]
        if (batch_idx + 1) % accumulation or not isinstance(times, StepTimes):
            return
        if times.on and (taken := times.take()).keys() == set(PHASES.values()):
            seconds = time.perf_counter() - self._began
            tokens = batch["labels"].numel() * accumulation
            self._add(trainer, module, tokens / seconds, taken)
        times.on = (trainer.global_step + 1) % EVERY == 0

    def _add(
        self, trainer: Trainer, module: PretrainModule, rate: float, taken: dict[str, float]
    ) -> None:
        row = {"tokens_per_second_per_device": rate, "tokens_per_second": rate * trainer.world_size}
        row |= {f"seconds/{phase}": taken[phase] for phase in PHASES.values()}
        if (peak := _peak(module.device)) is not None:
            seq_len = trainer.datamodule.seq_len  # type: ignore[attr-defined]
            row["model_flops_utilisation"] = rate * flops_per_token(module.model, seq_len) / peak
            module.log("mfu", row["model_flops_utilisation"], prog_bar=True, logger=False)
        self._rows.append(row)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                named = {f"throughput/{name}": value for name, value in row.items()}
                logger.log_metrics(named, step=trainer.global_step)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero and self._rows:
            rows = self._rows
            medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
            found = medians | {"steps": len(rows), "peak_memory": _peak_memory()}
            update_record(self._run_dir / "run.json", throughput=found)


def _peak(device: torch.device) -> float | None:
    return device_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _peak_memory() -> int:
    if torch.accelerator.is_available():
        return int(torch.accelerator.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
