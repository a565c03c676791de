"""metrics.csv: one row per optimizer step at full precision; its columns, written and read."""

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
EMPTY_TEXT = "-nan"
EMPTY = float(EMPTY_TEXT)  # an empty cell: a NaN of other bits than one that a run writes

COLUMNS = (
    *("step", "tokens_seen", "train/loss", "grad_norm", "lr", "tokens_per_second"),
    *("quant/clamped", "quant/minus_128", "val/loss", "val/perplexity"),
    "val/loss_bf16",
)


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
    header, _, body = path.read_text(encoding="utf-8").partition("\n")
    if status != "finished":  # the last row may be half written
        body = body[: body.rfind("\n") + 1]
    names = header.split(",")
    missing = {"step", "tokens_seen", "train/loss"} - {*names}
    if missing:
        raise ValueError(f"{path} lacks the column {', '.join(sorted(missing))}")
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
    metrics = dict(zip(names, table.T.copy(), strict=True))
    if (np.diff(metrics["step"]) <= 0).any() or (np.diff(metrics["tokens_seen"]) <= 0).any():
        raise ValueError(f"{path}: steps or tokens_seen do not increase from row to row")
    return metrics
