"""run.json, read and written: what a run was made of and how it ended. And its config.yaml."""

import json
from pathlib import Path
from typing import Any

from data.durable import write_durably
from train.config.strict_yaml import load_yaml
from train.runs.outcome import STATUSES

FORMAT_VERSION = 1
REQUIRED = {"status", "recipe", "seed", "data", "model", "initial_weights", "max_steps"}
DATA_REQUIRED = {"fingerprint", "seq_len", "global_batch_size"}
_FILE = "run.json"


def has_record(folder: Path) -> bool:
    """Whether a run was begun in `folder`."""
    return (folder / _FILE).exists()


def run_status(folder: Path) -> str | None:
    """One of STATUSES; None where no run was begun."""
    return str(read_record(folder)["status"]) if has_record(folder) else None


def read_record(folder: Path) -> dict[str, Any]:
    """As it is; ValueError where it is no JSON object."""
    return read_json(folder / _FILE)


def checked_record(folder: Path) -> dict[str, Any]:
    """Of this format, with all keys that runs are compared by; ValueError otherwise."""
    record = read_record(folder)
    if record.get("format_version") != FORMAT_VERSION:
        found = record.get("format_version")
        raise ValueError(f"{folder}: format_version is {found}, this lowbit reads {FORMAT_VERSION}")
    missing = (REQUIRED - record.keys()) | (DATA_REQUIRED - record.get("data", {}).keys())
    if missing:
        raise ValueError(f"{folder}/{_FILE} lacks {', '.join(sorted(missing))}")
    if record["status"] not in STATUSES:
        raise ValueError(f"{folder}: status {record['status']!r} is none of {', '.join(STATUSES)}")
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Whole and on disk, or as it was."""
    write_durably(folder / _FILE, json.dumps(record, indent=2) + "\n")


def update_record(folder: Path, **changes: Any) -> None:
    """Set keys of it."""
    write_record(folder, read_record(folder) | changes)


def read_config(folder: Path) -> dict[str, Any]:
    """The run's config.yaml, by the same reader as the one that began it."""
    config: dict[str, Any] = load_yaml((folder / "config.yaml").read_text())
    return config


def read_json(path: Path) -> dict[str, Any]:
    """An object; ValueError, naming the file, for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}, not an object")
    return found
