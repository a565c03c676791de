"""Golden curves: the columns of runs at full precision in one JSON file, for CI to hold runs to."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from data.durable import write_durably
from data.plain import read_as, sealed
from train.runs.metrics import EMPTY, Array, checked_metrics, is_empty
from train.runs.record import checked
from train.runs.run import Run

FORMAT_VERSION = 2
OLD = 1  # held some columns, and no difference between NaN and an empty cell
OLD_COLUMNS = (
    "step",
    "tokens_seen",
    "train/loss",
    "grad_norm",
    "lr",
    "val/loss",
    "tokens_per_second",
)
# what pairing looks at; paths and versions are another machine's
INFO = (
    *("format_version", "status", "recipe", "recipe_table", "control", "seed", "data", "model"),
    *("initial_weights", "max_steps", "versions", "commit", "command", "identity", "declared"),
    *("segments", "precision", "bf16_products"),
)


def export_curves(runs: Sequence[Run], path: Path) -> None:
    """Write them; floats as their shortest text that reads back the same."""
    plain = {
        "format_version": FORMAT_VERSION,
        "runs": [
            {
                "name": run.path.resolve().name,
                "info": {key: run.info[key] for key in INFO if key in run.info},
                "metrics": {name: _plain(column) for name, column in run.metrics.items()},
            }
            for run in runs
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, json.dumps(sealed(plain), allow_nan=False) + "\n")


def check_golden_file(path: Path) -> None:
    """Raise FileExistsError unless `path` is new or holds golden curves."""
    try:
        if path.exists():
            import_curves(path)
    except (ValueError, OSError):
        raise FileExistsError(
            f"--export {path} is there and holds no golden curves: choose another file"
        ) from None


def import_curves(path: Path) -> list[Run]:
    """The exported runs, as if in a folder of the file's name."""
    plain = read_as(_Curves, path)
    version = plain["format_version"]
    if version not in (OLD, FORMAT_VERSION):
        raise ValueError(f"{path}: format_version is {version}, this lowbit reads {FORMAT_VERSION}")
    known = {"golden_columns": OLD_COLUMNS} if version == OLD else {}
    return [
        Run(path / run["name"], checked(run["info"], path) | known, _metrics(run["metrics"], path))
        for run in plain["runs"]
    ]


class _Golden(TypedDict):
    name: str
    info: dict[str, Any]
    metrics: dict[str, list[Any]]


class _Curves(TypedDict):
    format_version: int
    runs: list[_Golden]


def _metrics(columns: dict[str, list[Any]], path: Path) -> dict[str, Array]:
    found = {}
    for name, values in columns.items():
        try:
            cells = [EMPTY if x is None else float(x) for x in values]
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path}: {name[:40]}: {error}") from None
        found[name] = np.array(cells, dtype=np.float64)
    return checked_metrics(found, path)


def _plain(column: Array) -> list[Any]:
    """An empty cell is null; what JSON has no number for is its name."""
    empty = is_empty(column)
    return [
        None if hole else x if math.isfinite(x) else str(x)
        for x, hole in zip(column.tolist(), empty, strict=True)
    ]
