"""A logger that keeps every step's metrics at full precision, one row a step, through resumes."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from data.durable import write_durably
from train.runs.metrics import COLUMNS, metrics_line, read_rows


class MetricsCsv(Logger):
    """`metrics.csv` in `folder`; rows after `resume_step` are cut off when it opens.

    TensorBoard stores float32 and is for looking; this file is what `lowbit compare` reads.
    """

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        super().__init__()
        self.path = folder / "metrics.csv"
        self._resume_step = resume_step
        self._row: dict[str, Any] = {}
        self._file: Any = None
        self._start = 0  # of the row being collected, in the file
        self._written = True

    @property
    def name(self) -> str:
        """Lightning's word for the kind of logger."""
        return "metrics"

    @property
    def version(self) -> str:
        """Empty: a run folder holds one run."""
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """They are in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Values of one step may come in several calls (training, then validation)."""
        if self._file is None:
            self._open()
        if step != self._row.get("step"):
            self.flush()
            self._start, self._row = self._file.seek(0, os.SEEK_END), {}
        self._row |= {"step": step, **metrics}
        self._written = False
        if unknown := set(self._row) - set(COLUMNS):
            raise ValueError(f"metrics.csv has no column for {sorted(unknown)}")

    @rank_zero_only
    def flush(self) -> None:
        """Write the row being collected; where more comes for it, it is written again in place."""
        if self._written:
            return
        self._file.seek(self._start)
        self._file.write(
            metrics_line(self._row)
        )  # one call: a kill leaves the old row or the new one
        self._file.truncate()
        self._written = True

    @rank_zero_only
    def sync(self) -> None:
        """Make all rows durable: a checkpoint is not to outlive the metrics of its step."""
        self.flush()
        if self._file is not None:
            os.fsync(self._file.fileno())

    def _open(self) -> None:
        kept = [row for row in read_rows(self.path) if int(row["step"]) <= self._resume_step]
        last = kept[-1] if kept and int(kept[-1]["step"]) == self._resume_step else None
        lines = [metrics_line({column: column for column in COLUMNS}), *map(metrics_line, kept)]
        self._start = sum(len(line) for line in lines[:-1]) if kept else 0
        write_durably(self.path, b"".join(lines).decode())
        self._file = self.path.open("r+b", buffering=0)
        if last is not None:  # a validation that a stop put off may still add to it
            self._row = {k: v for k, v in last.items() if v} | {"step": self._resume_step}

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the last row and close the file."""
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None
            self._resume_step = sys.maxsize  # what is there now stays
