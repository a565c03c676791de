"""Rows of other trainers' files: CSV, JSON lines, torchtitan's console log, TensorBoard's events.

Each reader yields column -> {step: value}. Of a step that is there twice, as after a resume, the
later row counts.
"""

import csv
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data.plain import read_text

Columns = dict[str, dict[int, float]]
STEP = ("step", "Step", "global_step", "trainer/global_step", "_step", "iteration", "iter")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_NUMBER = r"([-+]?[\d,]*\.?\d+(?:[eE][-+]?\d+)?|nan|inf|-inf)"
_TITAN = re.compile(
    rf"(validate )?step:\s*([\d,]+)\s+loss:\s*{_NUMBER}(?:\s+grad_norm:\s*{_NUMBER})?"
)


def read_columns(path: Path, step: str | None) -> Columns:
    """Of any of the kinds; ValueError that names the file for what is none."""
    if path.is_dir():
        return _events(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    text = read_text(path)
    if path.suffix == ".csv":
        return _table(list(csv.DictReader(text.splitlines())), path, step)
    if path.suffix == ".jsonl":
        return _table(_json_lines(text, path), path, step)
    found = _titan(text)
    if not found:
        raise ValueError(f"{path}: no line of torchtitan's log, `step: 1  loss: 8.1`, in it")
    return found


def _json_lines(text: str, path: Path) -> list[Mapping[str, Any]]:
    try:
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: a line is no JSON object")
    return rows


def _table(rows: Iterable[Mapping[str, Any]], path: Path, step: str | None) -> Columns:
    names = list(dict.fromkeys(name for row in rows for name in row if isinstance(name, str)))
    if not names:
        raise ValueError(f"{path} has no rows")
    key = step or next((name for name in STEP if name in names), None)
    if key not in names:
        raise ValueError(f"{path} has no column {key or 'of steps'}: it has {_few(names)}")
    found: Columns = {name: {} for name in names}
    for row in rows:
        at = _number(row.get(key))
        if at is None or at < 0 or at != int(at):
            raise ValueError(f"{path}: {key}={str(row.get(key))[:20]} is no step")
        for name in names:
            value = _number(row.get(name))
            if value is not None:
                found[name][int(at)] = value
    return found


def _number(cell: Any) -> float | None:
    """None for an empty cell and for text, which another column may hold."""
    try:
        return None if cell in (None, "") else float(cell)
    except (TypeError, ValueError):
        return None


def _titan(text: str) -> Columns:
    found: Columns = {}
    for match in _TITAN.finditer(_ANSI.sub("", text)):
        validation, step, loss, norm = match.groups()
        at = int(step.replace(",", ""))
        found.setdefault("val_loss" if validation else "loss", {})[at] = float(
            loss.replace(",", "")
        )
        if norm:
            found.setdefault("grad_norm", {})[at] = float(norm.replace(",", ""))
    return found


def _events(path: Path) -> Columns:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not any(path.rglob("events.out.tfevents.*")):
        raise FileNotFoundError(f"{path}: no TensorBoard events in this folder")
    found: Columns = {}
    for folder in sorted({file.parent for file in path.rglob("events.out.tfevents.*")}):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, {}).update({e.step: e.value for e in events.Scalars(tag)})
        for tag in events.Tags()["tensors"]:
            points = {e.step: _scalar(e.tensor_proto) for e in events.Tensors(tag)}
            found.setdefault(tag, {}).update({k: v for k, v in points.items() if v is not None})
    return found


def _scalar(tensor: Any) -> float | None:
    from tensorboard.util.tensor_util import make_ndarray

    array = make_ndarray(tensor)
    return float(array) if array.ndim == 0 and array.dtype.kind in "fiu" else None


def _few(names: list[str]) -> str:
    shown = ", ".join(name[:30] for name in names[:6])
    return shown + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def column(columns: Columns, name: str | None, usual: Iterable[str], path: Path, what: str) -> Any:
    """The named one, or the first of the usual names; None without either."""
    if name is not None and name not in columns:
        raise ValueError(
            f"{path} has no column {name[:40]!r} for {what}: it has {_few([*columns])}"
        )
    key = name or next((each for each in usual if columns.get(each)), None)
    return columns[key] if key else None
