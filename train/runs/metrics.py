"""metrics.csv: one row per optimizer step at full precision; its columns, written and read."""

import csv
import hashlib
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.plain import read_text

Array = NDArray[np.float64]
EMPTY_TEXT = "-nan"
EMPTY = float(EMPTY_TEXT)  # an empty cell: a NaN of other bits than one that a run writes

COLUMNS = (
    *("step", "tokens_seen", "train/loss", "grad_norm", "lr", "tokens_per_second"),
    *("quant/clamped", "quant/minus_128", "val/loss", "val/perplexity"),
    "val/loss_bf16",
)


NEEDED = {"step", "tokens_seen", "train/loss"}


def is_empty(column: Array) -> NDArray[np.bool_]:
    """Where the cell was empty, which a NaN that a run wrote is not."""
    return np.isnan(column) & np.signbit(column)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where FP64 has no number for it: from 709.8 nats on."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def metrics_line(row: Mapping[str, Any]) -> bytes:
    """One row, every float at full precision, with its line end."""
    text = io.StringIO(newline="")
    csv.DictWriter(text, COLUMNS).writerow({k: _text(v) for k, v in row.items()})
    return text.getvalue().encode()


def _text(value: float) -> str:
    return repr(value) if isinstance(value, float) else str(value)


HEADER = metrics_line({column: column for column in COLUMNS})


@dataclass(frozen=True)
class Mark:
    """The rows of a metrics.csv when a checkpoint was saved: what a resume goes on from."""

    columns: str  # the header's line
    length: int  # in bytes, of the header and all rows before the checkpoint's step
    sha256: str  # of those bytes
    row: str  # of its step; a validation that was put off may add cells to it

    def check(self, data: bytes) -> str | None:
        """What is wrong with the rows in `data`; None for these, or in another lowbit's columns."""
        if not data:
            return "is missing or empty"
        if not data.startswith(self.columns.encode()):
            return None if data.startswith(b"step,tokens_seen,") else "is no metrics.csv"
        own = data[self.length : self.length + 4096].partition(b"\n")[0].decode(errors="replace")
        if hashlib.sha256(memoryview(data)[: self.length]).hexdigest() != self.sha256:
            return "lacks rows" if len(data) < self.length else "is another run's, or was changed"
        cells = zip(self.row.strip().split(","), own.strip().split(","), strict=False)
        if not own or any(mine not in ("", theirs) for mine, theirs in cells):
            return "lacks the last row" if not own else "has another last row"
        return None


def rows_end(data: bytes | mmap, step: int) -> int:
    """Where the rows up to `step` end. They are in ascending order, so by bisection; what follows
    the last line end is half a row.
    """
    low, high = data.find(b"\n") + 1, data.rfind(b"\n") + 1
    while low < high:
        middle = (low + high) // 2
        begin, end = data.rfind(b"\n", 0, middle) + 1, data.find(b"\n", middle) + 1
        first = data[begin:end].partition(b",")[0]
        if not first.isdigit():
            raise ValueError(f"a row begins with {first[:20]!r}, expected a step")
        low, high = (end, high) if int(first) <= step else (low, begin)
    return low


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows as text, for a file that is to be gone on with; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_metrics(path: Path, status: str) -> dict[str, Array]:
    """Columns of metrics.csv; a run that stopped before its first step has none yet."""
    if status != "finished" and not path.exists():
        return {name: np.empty(0) for name in ("step", "tokens_seen", "train/loss")}
    header, _, body = read_text(path).replace("\r\n", "\n").partition("\n")
    if status != "finished":  # the last row may be half written
        body = body[: body.rfind("\n") + 1]
    names = header.split(",")
    _check_header(names, path)
    for _ in range(2):  # ",,," holds two empty cells, of which one pass fills the first
        body = body.replace(",,", f",{EMPTY_TEXT},")
    body = body.replace(",\n", f",{EMPTY_TEXT}\n") + (EMPTY_TEXT if body.endswith(",") else "")
    if not body.strip():
        return {name: np.empty(0) for name in names}
    try:
        table = np.loadtxt(io.StringIO(body), delimiter=",", ndmin=2)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if table.shape[1] != len(names):
        raise ValueError(
            f"{path}: {len(names)} columns in its header, {table.shape[1]} in its rows"
        )
    return checked_metrics(dict(zip(names, table.T.copy(), strict=True)), path)


def _check_header(names: list[str], path: object) -> None:
    if missing := NEEDED - {*names}:
        raise ValueError(f"{path} lacks the column {', '.join(sorted(missing))}")
    # another lowbit's may hold further ones
    if wrong := [n for n in names if not re.fullmatch(r"[\w/.-]+", n) or names.count(n) > 1]:
        raise ValueError(f"{path}: the column {wrong[0][:40]!r} is no name, or there twice")


def checked_metrics(metrics: dict[str, Array], where: object) -> dict[str, Array]:
    """Columns of one length whose steps are whole numbers and go on; ValueError otherwise."""
    _check_header([*metrics], where)
    if len({len(column) for column in metrics.values()}) > 1:
        raise ValueError(f"{where}: its columns differ in length")
    for name in ("step", "tokens_seen"):
        counts = metrics[name]
        if not (np.isfinite(counts) & (counts > 0) & (counts == np.floor(counts))).all():
            raise ValueError(f"{where}: {name} is not a positive whole number in every row")
        if (np.diff(counts) <= 0).any():
            raise ValueError(f"{where}: steps or tokens_seen do not increase from row to row")
    return metrics
