"""MLflow, W&B (offline) and trackio themselves hold metrics.csv, also after a SIGKILL and a resume.

Each is skipped where it is not installed; docs/loggers.md says how to run them.
"""

import csv
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

Rows = list[dict[str, float]]
STEPS = 12


def mlflow_rows(run: Path, killed: bool) -> tuple[Rows, dict[str, Any]]:
    pytest.importorskip("mlflow")
    client = import_module("mlflow.tracking").MlflowClient(f"sqlite:///{run.parent}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "lowbit"]
    (found,) = client.search_runs([experiment.experiment_id])
    values: dict[int, dict[str, float]] = {}
    for key in found.data.metrics:
        for point in client.get_metric_history(found.info.run_id, key):
            assert key not in values.setdefault(point.step, {"step": point.step}), "twice"
            values[point.step][key] = point.value
    assert found.info.status == "FINISHED"
    return [values[step] for step in sorted(values)], {
        "lr": float(found.data.params["model/optimization/lr"]),
        "identity": found.data.params["identity"],
    }


def leveldb_log(data: bytes, position: int) -> Iterator[bytes]:
    """Records of LevelDB's log format, in blocks of 32 KiB, from a position of it on."""
    begin, whole = position, b""
    while position - begin + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position - begin)
        whole += data[position - begin + 7 : position - begin + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""


def wandb_rows(run: Path, killed: bool) -> tuple[Rows, dict[str, Any]]:
    pytest.importorskip("wandb")
    record = import_module("wandb.proto.wandb_internal_pb2").Record
    runs: dict[str, tuple[Rows, dict[str, Any]]] = {}
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime):
        for found in leveldb_log(path.read_bytes()[7:], 7):
            entry = record()
            entry.ParseFromString(found)
            if entry.WhichOneof("record_type") == "run":
                rows, config = runs.setdefault(entry.run.run_id, ([], {}))
            elif entry.WhichOneof("record_type") == "history":
                items = entry.history.item
                row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
                row["step"] = row.pop("trainer/global_step")
                rows.append({k: v for k, v in row.items() if not k.startswith("_")})
            elif entry.WhichOneof("record_type") == "config":
                config |= {i.key: json.loads(i.value_json) for i in entry.config.update}
    assert len(runs) == (2 if killed and len(runs) > 1 else 1)  # a killed one's file may be empty
    return rows, {
        "lr": config["model"]["optimization"]["lr"],
        "identity": config["identity"],
    }


def trackio_rows(run: Path, killed: bool) -> tuple[Rows, dict[str, Any]]:
    for module in [name for name in sys.modules if name.startswith("trackio")]:
        del sys.modules[module]  # they have read TRACKIO_DIR when they were imported
    storage = import_module("trackio.sqlite_storage").SQLiteStorage
    *before, name = storage.get_runs("lowbit")
    assert len(before) <= killed  # what a killed one left, if it had sent anything
    rows = [
        {k: v for k, v in row.items() if k != "timestamp"}
        for row in storage.get_logs("lowbit", name)
    ]
    config = storage.get_run_config("lowbit", name)
    return rows, {"lr": config["model"]["optimization"]["lr"], "identity": config["identity"]}


READERS: dict[str, Callable[[Path, bool], tuple[Rows, dict[str, Any]]]] = {
    "mlflow": mlflow_rows,
    "wandb": wandb_rows,
    "trackio": trackio_rows,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of their libraries
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("name", READERS)
def test_rows_after_a_kill(
    name: str,
    sent: signal.Signals,
    tiny: Path,
    tiny_data: Path,
    recipes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip(name)
    run = tmp_path / "run"
    command = [sys.executable, "-m", "train.cli", "fit", "-c", str(tiny)]
    command += ["-c", str(recipes / "mxint8.yaml"), "--data.path", str(tiny_data)]
    command += ["--run_dir", str(run), "--log", name, "--checkpoint_every", "2"]
    command += ["--trainer.max_steps", str(STEPS)]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while started.poll() is None and len(list((run / "checkpoints").glob("step-*[0-9]"))) < 2:
        time.sleep(0.002)
    started.send_signal(sent)
    assert started.wait() == (-sent if sent == signal.SIGKILL else 128 + sent)
    ended = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "resumed after step" in ended.stdout
    rows, described = READERS[name](run, sent == signal.SIGKILL)
    with (run / "metrics.csv").open(newline="") as file:
        own = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    assert rows == own and len(own) == STEPS
    record = json.loads((run / "run.json").read_text())
    assert described == {"lr": 0.01, "identity": record["identity"]["hash"]}
