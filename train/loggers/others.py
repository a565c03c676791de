"""Loggers of others get a row of metrics.csv when no resume can take it back, and get it once.

A run that is killed goes on from its newest checkpoint, and makes the rows after it again. So a row
is handed over with the first checkpoint of its step or a later one. What was handed over stands in
the run folder, before it is: a row that a kill meets on its way is not sent a second time.
"""

import mmap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, WandbLogger

from train.loggers.metrics_csv import MetricsCsv
from train.loggers.named import Named, write_ledger
from train.runs.metrics import COLUMNS, rows_end


class OtherLoggers(Callback):
    """`describe` yields what a run is, once it has begun."""

    def __init__(
        self, named: Sequence[Named], folder: Path, describe: Callable[[], dict[str, Any]]
    ) -> None:
        self._named, self._folder, self._describe = named, folder, describe
        self._begun = False

    @property
    def loggers(self) -> list[Logger]:
        """For the trainer's list: a callback may log to them what it likes."""
        return [each.logger for each in self._named]

    def connect(self) -> None:
        """Where each writes: a ValueError for one that cannot."""
        for each in self._named:
            try:
                _ = getattr(each.logger, "experiment", None)
                each.entry()
            except Exception as error:
                text = " ".join(str(error).split())[:120]
                raise ValueError(f"{each.kind} does not begin: {text}") from error

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """The configuration, to those that do not have it."""
        if trainer.is_global_zero and self._named:
            for each in self._named:
                if each.is_new:
                    each.logger.log_hyperparams(self._describe())
            write_ledger(self._named, self._folder)
            self._begun = True

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        """The rest."""
        for own in trainer.loggers:
            if isinstance(own, MetricsCsv):
                own.flush()
        if trainer.is_global_zero:
            self.send(trainer.global_step)

    def send(self, last: int) -> None:
        """The rows up to this step."""
        for each in self._named:
            try:
                self._send(each, last)
            except Exception as error:  # a server that is away ends no run
                if not each.failing:
                    text = " ".join(str(error).split())[:120]
                    print(
                        f"lowbit: {each.kind} did not take the rows after step {each.handed} "
                        f"({text}); the run goes on, and offers them again with each checkpoint",
                        flush=True,
                    )
                each.failing = True
            else:
                each.failing = False

    def _send(self, each: Named, last: int) -> None:
        for step, row in _rows(self._folder / "metrics.csv", each.handed, last):
            before, each.handed = each.handed, step
            write_ledger(self._named, self._folder)
            try:
                each.logger.log_metrics(row, step=step)
            except Exception:
                each.handed = before
                write_ledger(self._named, self._folder)
                raise
        each.logger.save()

    def close(self) -> None:
        """All rows are where they belong; W&B's run would be the next one's of this process too."""
        for each in self._named:
            run = getattr(each.logger, "_experiment", None)
            if isinstance(each.logger, WandbLogger) and run is not None:
                run.finish()
            each.closed = True
        if self._begun:
            write_ledger(self._named, self._folder)


def _rows(path: Path, after: int, last: int) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, its cells) of the rows after a step, up to another."""
    if last <= after:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        lines = data[rows_end(data, after) : rows_end(data, last)].decode().splitlines()
    for line in lines:
        cells = {c: _number(t) for c, t in zip(COLUMNS, line.split(","), strict=True) if t}
        yield int(cells.pop("step")), cells


def _number(text: str) -> float:
    return int(text) if text.isdigit() else float(text)
