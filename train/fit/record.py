"""What a run is made of, into run.json before the first step, and how it ended."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from data.module import TokenDataModule
from lowbit import kernels
from train.config.classes import source_hashes
from train.distributed.ranks import products_of_all
from train.fit.signals import Preempted
from train.loggers.metrics_csv import MetricsCsv
from train.model.module import PretrainModule
from train.model.recipe_table import phase_rows
from train.runs.belonging import metrics_digest
from train.runs.exports import sign_weights
from train.runs.identity import Identity
from train.runs.outcome import NonFiniteError
from train.runs.provenance import code_origin, command_line
from train.runs.record import (
    FORMAT_VERSION,
    has_record,
    read_record,
    update_record,
    write_record,
)
from train.runs.segments import continued, initial_weights_of, segments_of


@dataclass(frozen=True)
class Start:
    """How a job begins or goes on with a run."""

    config: dict[str, Any]  #: resolved, as config.yaml holds it
    command: list[str]
    step: int = 0  #: finished before
    origin: dict[str, Any] = field(default_factory=dict)  #: of the checkpoint it goes on from


class RunRecord(Callback):
    """Keeps `run.json` in `folder` true; knows the identity of the run once it has weights."""

    def __init__(self, folder: Path, start: Start) -> None:
        self._folder = folder
        self._start = start
        self.identity: dict[str, Any] | None = None  #: on the rank that writes
        self.segments: list[dict[str, Any]] = []
        self.circumstances: dict[str, Any] = {}  #: that may move last digits

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Before the first step, or when a run goes on."""
        assert isinstance(module, PretrainModule)
        products = products_of_all(module.device.type)
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        record = describe_run(trainer, module, data, self._start.config)
        own = trainer.ckpt_path is not None and has_record(self._folder)
        before = read_record(self._folder) if own else self._start.origin
        record["bf16_products"] = products
        record |= _carried(before, self._start, record)
        record["identity"] = Identity.of(record, self._start.config).plain()
        self.identity, self.segments = record["identity"], record["segments"]
        self.circumstances = {key: record[key] for key in ("versions", "machine", "kernels")}
        if own:  # what the run was at its first start stays; how it went on is in the history
            changed = ("status", "max_steps", "phases", "segments", "starts", "identity", *_OF_NOW)
            kept = {k: v for k, v in before.items() if k not in ("error", "metrics", "export")}
            record = kept | {key: record[key] for key in changed}
        write_record(self._folder, record)

    def announce(self, max_steps: int) -> None:
        """A changed horizon begins a segment: said before it does."""
        before = read_record(self._folder) if has_record(self._folder) else self._start.origin
        for old in segments_of(before)[-1:]:
            if old["max_steps"] != max_steps:
                print(
                    f"lowbit: a new segment from step {self._start.step + 1} on: max_steps "
                    f"{old['max_steps']} -> {max_steps}, and with it the schedule. Not a pair of a "
                    "run without it; another run_dir starts anew",
                    flush=True,
                )

    def sign(self, folder: Path) -> str:
        """Leave in `folder` whose weights these are; the SHA-256 of what says so."""
        return sign_weights(folder, self.identity, self.segments[-1]["max_steps"])

    def on_exception(
        self, trainer: Trainer, module: LightningModule, exception: BaseException
    ) -> None:
        """How the run ended, unless it was asked to stop."""
        if isinstance(exception, Preempted):
            return  # still running: the next start goes on
        if trainer.is_global_zero and has_record(self._folder):
            status = "diverged" if isinstance(exception, NonFiniteError) else "failed"
            try:
                self._end(status, str(exception), _rows_left(trainer, self._folder))
            except OSError as error:  # a full disk: what ended the run is what is to be said
                print(f"lowbit: {error}; it does not say that the run {status}", flush=True)

    def _end(self, status: str, error: str, rows: dict[str, Any]) -> None:
        """As it stands now, and for good in the history of starts."""
        how = {"status": status, "error": error}
        starts = read_record(self._folder).get("starts", [])
        for start in starts[-1:]:
            start["ended"] = how
        update_record(self._folder, **how, starts=starts, **rows)


#: of run.json, what is true of the newest start; what was before is in `starts`
_OF_NOW = ("versions", "machine", "commit", "threads", "world_size", "kernels")


def _rows_left(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """The digest of metrics.csv as it is left; nothing where a disk does not let it be written."""
    try:
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCsv):
                logger.sync()
        return {"metrics": {"sha256": metrics_digest(folder)}}
    except OSError:
        return {}


def _carried(before: dict[str, Any], start: Start, record: dict[str, Any]) -> dict[str, Any]:
    """What the run's earlier starts decided: its weights and segments, and a line for this one."""
    now = {key: record[key] for key in ("max_steps", "accumulate_grad_batches", "phases")}
    now["val_check_interval"] = start.config["trainer"]["val_check_interval"]
    segments = continued(segments_of(before), now, start.step)
    starts = [*before.get("starts", []), _start_row(start, record)]
    found: dict[str, Any] = {"segments": segments, "starts": starts}
    if start.step and (weights := initial_weights_of(before)) is not None:
        found["initial_weights"] = weights
    return found


def _start_row(start: Start, record: dict[str, Any]) -> dict[str, Any]:
    """Provenance: beside the identity, no part of it."""
    when = datetime.now(UTC).isoformat(timespec="seconds")
    kept = ("command", "versions", "machine", "commit", "threads", "world_size")
    return {"time": when, "after_step": start.step} | {key: record[key] for key in kept}


def describe_run(
    trainer: Trainer, module: PretrainModule, data: TokenDataModule, config: dict[str, Any]
) -> dict[str, Any]:
    """The record of a run that begins; before it has weights, without their hash."""
    layers = module.quantized_layers
    return {
        "format_version": FORMAT_VERSION,
        "status": "running",
        "recipe": module.policy.name,
        "control": module.control,
        "recipe_table": [{"layer": n} | q.recipe.table() for n, q in layers.items()],
        "phases": phase_rows(module.policy, trainer.max_steps),
        "backend": sorted({layer.backend.name for layer in layers.values()}),
        "kernels": kernels.enabled(module.device.type),
        "seed": module.seed,
        "parts": source_hashes(
            [config["model"].get("optimization"), config["trainer"].get("callbacks")]
        ),
        "declared": config.get("declared") or [],
        "data": {
            "path": str(data.path),
            "fingerprint": data.fingerprint,
            "seq_len": data.seq_len,
            "global_batch_size": data.global_batch_size,
            "vocab_size": data.vocab_size,
            "seed": data.seed,
            "val_windows": data.val_windows,
            "val_choice": data.val_choice,
        },
        "model": module.model.config.to_dict(),
        "parameters": sum(p.numel() for p in module.parameters()),
        "initial_weights": module.initial.hash,
        "init_from": module.init_from,
        "teacher_weights": module.teacher and module.teacher.hash,
        "max_steps": trainer.max_steps,
        "precision": str(trainer.precision),
        "world_size": trainer.world_size,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "threads": torch.get_num_threads(),
        **code_origin(),
        "command": command_line(),
    }


def finish_record(folder: Path, signature: str) -> None:
    """The run has done all its steps and left its weights, signed; metrics.csv is as it stays."""
    left = {"metrics": {"sha256": metrics_digest(folder)}, "export": {"sha256": signature}}
    update_record(folder, status="finished", **left)
