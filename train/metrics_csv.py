"""A logger that keeps every step's metrics at full precision, one row a step, through resumes."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

COLUMNS = (
    *("step", "tokens_seen", "train/loss", "grad_norm", "lr", "tokens_per_second"),
    *("quant/clamped", "quant/minus_128", "val/loss", "val/perplexity"),
)


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

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """They are in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Values of one step may come in several calls (training, then validation)."""
        if step != self._row.get("step"):
            self.flush()
        self._row |= {"step": step, **metrics}
        if unknown := set(self._row) - set(COLUMNS):
            raise ValueError(f"metrics.csv has no column for {sorted(unknown)}")

    @rank_zero_only
    def flush(self) -> None:
        """Write the row being collected to the file."""
        if not self._row:
            return
        if self._file is None:
            self._open()
        csv.DictWriter(self._file, COLUMNS).writerow({k: _text(v) for k, v in self._row.items()})
        self._file.flush()
        self._row = {}

    def _open(self) -> None:
        kept = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                kept = [
                    row for row in csv.DictReader(file) if int(row["step"]) <= self._resume_step
                ]
        staging = self.path.with_suffix(".tmp")
        with staging.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(kept)
        staging.replace(self.path)
        self._file = self.path.open("a", newline="")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None


def _text(value: float) -> str:
    return repr(value) if isinstance(value, float) else str(value)
