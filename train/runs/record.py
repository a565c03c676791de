"""run.json, read and written: what a run was made of and how it ended. And its config.yaml."""

import json
from pathlib import Path
from typing import Any, Required, TypedDict, cast

from data.durable import write_durably
from data.plain import as_type, read_json
from train.config.strict_yaml import read_yaml
from train.runs.outcome import STATUSES

FORMAT_VERSION = 1
REQUIRED = {"status", "recipe", "seed", "data", "model", "initial_weights", "max_steps"}
DATA_REQUIRED = {"fingerprint", "seq_len", "global_batch_size"}
_FILE = "run.json"


class _Data(TypedDict, total=False):
    path: str
    fingerprint: str
    seq_len: int
    global_batch_size: int
    vocab_size: int
    seed: int
    val_windows: int | None
    val_choice: str


class _Start(TypedDict, total=False):
    time: str
    after_step: int
    command: list[str]
    versions: dict[str, str]
    commit: str | None
    threads: Required[int]
    machine: Required[str]
    world_size: Required[int]


class _Segment(TypedDict):
    first_step: int
    max_steps: int
    val_check_interval: int | float | None
    accumulate_grad_batches: int


class _Identity(TypedDict):
    version: int
    hash: str
    fields: dict[str, Any]


class Record(TypedDict, total=False):
    """What of run.json anyone reads; it holds more."""

    format_version: Any  # who reads it compares it
    status: Required[str]
    error: str
    recipe: str
    control: str | None
    seed: int
    data: _Data
    model: dict[str, Any]
    initial_weights: str | None
    max_steps: int
    precision: str
    bf16_products: str
    accumulate_grad_batches: int
    threads: int
    world_size: int
    machine: str
    versions: dict[str, str]
    commit: str | None
    command: list[str]
    declared: list[str] | None
    recipe_table: list[dict[str, Any]]
    phases: list[Any]
    identity: _Identity | None
    segments: list[_Segment]
    starts: list[_Start]
    metrics: dict[str, str]


class _WholeData(TypedDict):
    path: str
    seq_len: int
    global_batch_size: int


class _WholeModel(TypedDict):
    policy: Any
    llama: dict[str, Any]


class _WholeTrainer(TypedDict):
    precision: str
    max_steps: int


class _Whole(TypedDict):
    seed_everything: int
    data: _WholeData
    model: _WholeModel
    trainer: _WholeTrainer


def has_record(folder: Path) -> bool:
    """Whether a run was begun in `folder`."""
    return (folder / _FILE).exists()


def run_status(folder: Path) -> str | None:
    """One of STATUSES; None where no run was begun."""
    return str(read_record(folder)["status"]) if has_record(folder) else None


def read_record(folder: Path) -> dict[str, Any]:
    """As it is; ValueError where something in it is not of its kind."""
    path = folder / _FILE
    return cast(dict[str, Any], as_type(Record, read_json(path), str(path)))


def checked_record(folder: Path) -> dict[str, Any]:
    """Of this format, with all keys that runs are compared by; ValueError otherwise."""
    path = folder / _FILE
    return checked(read_json(path), path)


def checked(plain: Any, where: Path) -> dict[str, Any]:
    """The same for a record that is read already."""
    found = plain.get("format_version") if isinstance(plain, dict) else None
    if isinstance(plain, dict) and found != FORMAT_VERSION:
        raise ValueError(f"{where}: format_version is {found}, this lowbit reads {FORMAT_VERSION}")
    record = cast(dict[str, Any], as_type(Record, plain, str(where)))
    missing = (REQUIRED - record.keys()) | (DATA_REQUIRED - record.get("data", {}).keys())
    if missing:
        raise ValueError(f"{where} lacks {', '.join(sorted(missing))}")
    if record["status"] not in STATUSES:
        raise ValueError(f"{where}: status {record['status']!r} is none of {', '.join(STATUSES)}")
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Whole and on disk, or as it was."""
    write_durably(folder / _FILE, json.dumps(record, indent=2) + "\n")


def update_record(folder: Path, **changes: Any) -> None:
    """Set keys of it."""
    write_record(folder, read_record(folder) | changes)


def read_config(folder: Path) -> dict[str, Any]:
    """The run's config.yaml, by the same reader as the one that began it; a mapping."""
    path = folder / "config.yaml"
    return cast(dict[str, Any], as_type(dict[str, Any], read_yaml(path), str(path)))


def read_whole_config(folder: Path) -> dict[str, Any]:
    """The same, with all that says how to compute as the run did."""
    return cast(dict[str, Any], as_type(_Whole, read_config(folder), f"{folder}/config.yaml"))
