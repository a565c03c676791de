"""How fast a run is, and where the time of its steps goes."""

import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.profilers import Profiler
from torch import Tensor

from train.fit.at_steps import AtSteps
from train.fit.communication import CommunicationProfile
from train.loggers.event_log import EventLog
from train.model.flops import device_peak, flops_per_token
from train.model.module import PretrainModule
from train.runs.record import update_record

# the last part of Lightning's name of an action -> what we call it
PHASES = {
    "train_dataloader_next": "data",
    "training_step": "forward",
    "backward": "backward",
    "optimizer_step": "optimizer",
}
EVERY = 10  # steps: a device is waited for at each phase's end, which costs a little
PROFILE_EVERY = 100  # steps: what a profile of one costs


class StepTimes(Profiler):
    """Seconds in each phase without those inside it; an optimizer step holds forward and backward.

    A phase holds the communication that it waits for: FSDP2's gathers in forward and backward, the
    gradients' reduction in backward, that of their norm in optimizer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.on = True
        self._began: list[tuple[str, float]] = []
        self._seconds: dict[str, float] = defaultdict(float)

    def start(self, action_name: str) -> None:
        """A phase begins inside the one before."""
        if self.on and (phase := PHASES.get(action_name.rpartition(".")[2])):
            self._began.append((phase, _now()))

    def stop(self, action_name: str) -> None:
        """A phase ends; the one around it goes on."""
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


class Throughput(AtSteps):
    """To TensorBoard every EVERY steps, to run.json at the end: medians over the looked-at steps.

    tokens/s per device and in all, seconds by phase, the share of the device's BF16 peak (model
    FLOPs utilisation, where the peak is known), peak memory of this rank in bytes: the
    accelerator's tensors, or the process where there is none.

    With several ranks also the communication of rank 0 (`CommunicationProfile`), in a start's
    second step and every PROFILE_EVERY after it. Its seconds lie within or beside the phases': they
    are no further summand.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._found: dict[str, list[float]] = defaultdict(list)
        self._steps = 0  #: finished since the start
        self._profile: CommunicationProfile | None = None

    def on_step_start(self, trainer: Trainer, module: PretrainModule) -> None:
        """The step's time begins."""
        if self._steps % PROFILE_EVERY == 1 and self._profiles(trainer):
            self._profile = CommunicationProfile(module.device)
        self._began = time.perf_counter()

    def _profiles(self, trainer: Trainer) -> bool:
        ours = isinstance(trainer.profiler, StepTimes)  # type: ignore[attr-defined]
        return ours and trainer.is_global_zero and trainer.world_size > 1

    def on_step_end(
        self, trainer: Trainer, module: PretrainModule, batch: Mapping[str, Tensor]
    ) -> None:
        """What was measured, if the step was looked at."""
        times = trainer.profiler  # type: ignore[attr-defined]
        if not isinstance(times, StepTimes):
            return
        self._steps += 1
        taken = times.take()
        if self._profile is not None:
            self._add(trainer, {f"seconds/{n}": s for n, s in self._profile.stop().items()})
            self._profile = None
        elif taken.keys() == set(PHASES.values()):
            seconds = time.perf_counter() - self._began
            tokens = batch["labels"].numel() * trainer.accumulate_grad_batches
            self._add(trainer, self._figures(trainer, module, tokens / seconds, taken))
        times.on = (trainer.global_step + 1) % EVERY == 0

    def _figures(
        self, trainer: Trainer, module: PretrainModule, rate: float, taken: dict[str, float]
    ) -> dict[str, float]:
        row = {"tokens_per_second_per_device": rate, "tokens_per_second": rate * trainer.world_size}
        row |= {f"seconds/{phase}": taken[phase] for phase in PHASES.values()}
        if (peak := _peak(module.device)) is not None:
            seq_len = trainer.datamodule.seq_len  # type: ignore[attr-defined]
            row["model_flops_utilisation"] = rate * flops_per_token(module.model, seq_len) / peak
            module.log("mfu", row["model_flops_utilisation"], prog_bar=True, logger=False)
        return row

    def _add(self, trainer: Trainer, row: dict[str, float]) -> None:
        for name, value in row.items():
            self._found[name].append(value)
        for logger in trainer.loggers:
            if isinstance(logger, EventLog):
                named = {f"throughput/{name}": value for name, value in row.items()}
                logger.log_metrics(named, step=trainer.global_step)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """The medians, into run.json."""
        if trainer.is_global_zero and self._found:
            medians = {name: statistics.median(values) for name, values in self._found.items()}
            steps = len(self._found["tokens_per_second"])
            found = medians | {"steps": steps, "peak_memory": _peak_memory()}
            update_record(self._run_dir, throughput=found)


def _peak(device: torch.device) -> float | None:
    return device_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _peak_memory() -> int:
    if torch.accelerator.is_available():
        return int(torch.accelerator.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
