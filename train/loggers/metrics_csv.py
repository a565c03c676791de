"""A logger that keeps every step's metrics at full precision, one row a step, through resumes."""

import hashlib
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from data.durable import unwritten, write_durably
from train.runs.metrics import COLUMNS, HEADER, Mark, metrics_line, read_rows, rows_end


class MetricsCsv(Logger):
    """`metrics.csv` in `folder`; rows after `resume_step` are cut off when it opens.

    TensorBoard stores float32 and is for looking; this file is what `lowbit compare` reads.
    """

    def __init__(self, folder: Path, resume_step: int = 0, *, patient: bool = False) -> None:
        """`patient`: keep rows that cannot be written, and write them with the next."""
        super().__init__()
        self._patient, self._kept = patient, b""
        self.path = folder / "metrics.csv"
        self._resume_step = resume_step
        self._row: dict[str, Any] = {}
        self._file: Any = None
        self._start = 0  # of the row being collected, in the file
        self._before = hashlib.sha256()  # of all before it
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
        row = {name: metrics[name] for name in COLUMNS if name in metrics}
        if not row:
            return  # a callback's own, which go to TensorBoard and to loggers of the user's
        if self._file is None:
            self._open()
        if step != self._row.get("step"):
            self._write_if_possible()
            self._close_row()
        self._row |= {"step": step, **row}
        self._written = False

    def _close_row(self) -> None:
        """No more comes for the row being collected."""
        line = metrics_line(self._row) if self._row else b""
        self._before.update(line)
        if not self._written:
            self._kept += line
        self._start, self._row = self._start + len(line), {}

    @rank_zero_only
    def flush(self) -> None:
        """Write the row being collected; where more comes for it, it is written again in place."""
        if self._written:
            return
        rows = self._kept + metrics_line(self._row)
        try:  # one call: a kill leaves the old row or the new
            _write(self._file, self._start - len(self._kept), rows)
        except OSError as error:
            raise unwritten(self.path, error) from error
        self._written, self._kept = True, b""

    def _write_if_possible(self) -> None:
        try:
            self.flush()
        except OSError as error:
            if not self._patient:
                raise
            if not self._kept:
                print(f"lowbit: {error}; its rows are kept until they can be", flush=True)

    @rank_zero_only
    def sync(self) -> None:
        """Make all rows durable: a checkpoint is not to outlive the metrics of its step."""
        self.flush()
        if self._file is not None:
            os.fsync(self._file.fileno())

    def mark(self) -> dict[str, Any] | None:
        """Of the rows so far, for a checkpoint; None where there are none."""
        if self._file is None or not self._row:
            return None
        row = metrics_line(self._row).decode()
        return asdict(Mark(HEADER.decode(), self._start, self._before.hexdigest(), row))

    def _open(self) -> None:
        data = self.path.read_bytes() if self.path.exists() else b""
        if not data.startswith(HEADER):  # none, or of an older lowbit
            data = HEADER + b"".join(map(metrics_line, read_rows(self.path)))
            write_durably(self.path, data.decode())
        try:
            end = rows_end(data, self._resume_step)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        self._file = self.path.open("r+b", buffering=0)
        self._file.truncate(end)
        last = data.rfind(b"\n", 0, max(end - 1, 0)) + 1
        cells = dict(zip(COLUMNS, data[last:end].decode().strip().split(","), strict=False))
        if end > len(HEADER) and cells["step"] == str(self._resume_step):
            # a validation that a stop put off may still add to it
            self._row = {k: v for k, v in cells.items() if v} | {"step": self._resume_step}
        self._start = last if self._row else end
        self._before = hashlib.sha256(data[: self._start])

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the last row and close the file."""
        if status == "failed":
            self._write_if_possible()  # what failed is said already
        else:
            self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None
            self._resume_step = sys.maxsize  # what is there now stays


def _write(file: Any, start: int, line: bytes) -> None:
    """The line at its place, and nothing after it. Where that fails, nothing is there at all: half
    a row would be taken for one.
    """
    file.seek(start)
    try:
        written = file.write(line)
        if written < len(line):  # a disk that fills up takes a part
            file.write(line[written:])
        file.truncate()
    except OSError:
        file.truncate(start)
        raise
