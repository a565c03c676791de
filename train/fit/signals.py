"""Signals ask for a stop; all ranks answer together, at the end of an optimizer step."""

import os
import re
import signal
import subprocess
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch
from lightning.pytorch import Trainer

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU)


def heeded() -> list[signal.Signals]:
    """SIGNALS, but a SIGHUP that whoever started us ignores: `nohup` means it."""
    ignores = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in SIGNALS if number != signal.SIGHUP or not ignores]


class Preempted(Exception):  # noqa: N818  # it is no error: a checkpoint is saved, the run can go on
    """The run stopped on request; `signum` says whose."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class StopRequest:
    """While entered, these signals only leave a note; a second SIGINT kills at once."""

    def __init__(self) -> None:
        self.signum = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in heeded()}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.signum = signum

    def agreed(self, trainer: Trainer) -> int:
        """The signal that any rank got, the same answer on all ranks; 0 for none."""
        if trainer.world_size == 1:
            return self.signum
        number = torch.tensor(self.signum, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
        return int(number)


def leave_signals_alone(trainer: Trainer) -> None:
    """Keep Lightning's handlers out: they stop between micro-batches, save, and exit with 0.

    With them goes the message about them that all ranks wait for in every micro-batch.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def requeue() -> None:
    """Put this SLURM job back into the queue, as SIGUSR1 (`--signal=USR1@90`) asks for."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    job = f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID", "")
    if not job:
        return
    if not re.fullmatch(r"\d+(_\d+)?", job):
        raise ValueError(f"SLURM job id {job!r} is not a number, or two joined by _")
    result = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    outcome = "requeued" if result.returncode == 0 else f"not requeued: {result.stderr.strip()}"
    print(f"lowbit: SLURM job {job} {outcome}", flush=True)


def end_with_launcher(poll_seconds: float = 1.0) -> None:
    """End this worker at once when the process that launched it is gone.

    Without it, ranks whose launcher was killed train on unseen. A run started from a shell is not a
    worker: it may outlive its shell.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ and os.environ.get("LOCAL_RANK", "0") == "0":
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(poll_seconds)
        os._exit(1)  # as sudden as a kill, which the checkpoints are made for

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()
