"""Runs of a sweep in processes of their own, N at a time, none of which outlives the sweep."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import MutableMapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from train.output.console import leave_torchao_out
from train.runs.lock import holder
from train.sweep.request import PlannedRun
from train.sweep.status import forecast

# what `lowbit fit` answers
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None  # found before any fork
POLL_SECONDS = 0.1
FORECAST_SECONDS = 2.0
CLEAR = "\r\x1b[K"  # the line that a run's progress bar stands in


def fit_command(planned: PlannedRun, configs: tuple[Path, ...]) -> list[str]:
    """`lowbit fit` in this Python; -P: the current folder's own `data` must not stand for ours."""
    return [sys.executable, "-P", "-m", "train.cli", *planned.command(configs)]


class Launcher:
    """Signals to the sweep go to its runs, which save and end; a killed sweep takes them along."""

    def __init__(self, configs: tuple[Path, ...], jobs: int) -> None:
        self._configs, self._jobs = configs, jobs
        self._running: dict[PlannedRun, subprocess.Popen[bytes]] = {}
        self.stopped = 0  #: the signal that ended the sweep

    def run(self, runs: list[PlannedRun]) -> dict[Path, str]:
        """Run all; the folders of those that failed, and why."""
        before = {number: signal.signal(number, self._forward) for number in SIGNALS}
        waiting, failed = deque(runs), dict[Path, str]()
        told: float | None = time.monotonic()
        try:
            while self._running or (waiting and not self.stopped):
                while waiting and len(self._running) < self._jobs and not self.stopped:
                    self._start(waiting)
                time.sleep(POLL_SECONDS)
                if told is not None and time.monotonic() - told > FORECAST_SECONDS:
                    told = None if self._forecast(runs) else time.monotonic()
                for planned, process in list(self._running.items()):
                    if (code := process.poll()) is not None:
                        del self._running[planned]
                        if code not in (0, 3) and not self.stopped:  # 3: diverged, a result
                            failed[planned.folder] = f"exit code {code}"
        finally:
            for process in self._running.values():
                process.kill()
            for number, handler in before.items():
                signal.signal(number, handler)
        return failed

    def _forecast(self, runs: list[PlannedRun]) -> bool:
        """Say how long it will take, if the first steps have shown that."""
        if (text := forecast(runs, self._jobs)) is not None:
            print(f"{CLEAR if sys.stdout.isatty() else chr(10)}{text}", flush=True)
        return text is not None

    def _start(self, waiting: "deque[PlannedRun]") -> None:
        """Start the next run, unless its folder's last job is still ending: then wait for it."""
        planned = waiting.popleft()
        if (who := holder(planned.folder)) is not None:
            print(f"{planned.folder} is in use by {who}: waiting for it", flush=True)
            while holder(planned.folder) is not None and not self.stopped:
                time.sleep(POLL_SECONDS)
        output: Any = None
        if self._jobs > 1:  # the lines of several runs would mix
            log = planned.folder.with_name("logs") / f"{planned.folder.name}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            output = log.open("ab")
            print(f"{planned.folder}: output in {log}", flush=True)
        environment = dict(os.environ)
        share_cores(environment, self._jobs)
        self._running[planned] = subprocess.Popen(
            fit_command(planned, self._configs),
            start_new_session=True,  # the terminal's Ctrl-C comes to the sweep alone, and once
            preexec_fn=partial(end_with, os.getpid()),
            stdout=output, stderr=subprocess.STDOUT if output else None, env=environment,
        )  # fmt: skip
        if output:
            output.close()

    def _forward(self, signum: int, frame: FrameType | None) -> None:
        self.stopped = signum
        for process in self._running.values():
            process.send_signal(signum)


def share_cores(environment: MutableMapping[str, str], jobs: int) -> None:
    """As many threads in all as there are cores, unless the user has said how many."""
    if jobs > 1:
        share = max(1, (os.cpu_count() or 1) // jobs)
        environment.setdefault("OMP_NUM_THREADS", str(share))
        environment["LOWBIT_JOBS"] = str(jobs)  # train/fit/slow.py


def end_with(parent: int) -> None:
    """In a child of `parent`: SIGTERM (save and end) when that is gone; Linux alone does it."""
    if _prctl is None:
        return
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it was gone before that call
        os._exit(1)


def begin_worker(parent: int) -> None:
    """First in a worker of a sweep's branches, before it imports what it works with."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's comes to the sweep, which ends us
    end_with(parent)
    leave_torchao_out()
