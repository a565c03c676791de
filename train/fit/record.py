"""`run.json`: what a run was made of, written before the first step and when it ends."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from data.module import TokenDataModule
from lowbit import kernels
from train.fit.guards import NonFiniteError
from train.fit.signals import Preempted
from train.model.module import PretrainModule
from train.model.recipe_table import phase_rows
from train.runs.run import run_status as run_status

FORMAT_VERSION = 1
_PACKAGES = ("lowbit", "torch", "lightning", "transformers", "datasets", "tokenizers")


class RunRecord(Callback):
    """Keeps `run.json` in `folder` true."""

    def __init__(self, folder: Path, command: list[str]) -> None:
        self._path = folder / "run.json"
        self._command = command

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, PretrainModule)
        if not trainer.is_global_zero:
            return
        if trainer.ckpt_path is None or not self._path.exists():
            _write(self._path, self._describe(trainer, module))
        else:
            phases = phase_rows(module.policy, trainer.max_steps)
            update_record(self._path, status="running", max_steps=trainer.max_steps, phases=phases)

    def on_exception(
        self, trainer: Trainer, module: LightningModule, exception: BaseException
    ) -> None:
        if isinstance(exception, Preempted):
            return  # still running: the next start goes on
        if trainer.is_global_zero and self._path.exists():
            status = "diverged" if isinstance(exception, NonFiniteError) else "failed"
            update_record(self._path, status=status, error=str(exception))

    def _describe(self, trainer: Trainer, module: PretrainModule) -> dict[str, Any]:
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, TokenDataModule)
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
            "initial_weights": module.initial_weights,
            "init_from": module.init_from,
            "max_steps": trainer.max_steps,
            "precision": str(trainer.precision),
            "world_size": trainer.world_size,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "threads": torch.get_num_threads(),
            **code_origin(),
            "command": self._command,
        }


def finish_record(folder: Path) -> None:
    """The run has done all its steps and left its weights."""
    update_record(folder / "run.json", status="finished")


def update_record(path: Path, **changes: Any) -> None:
    """Set keys of a `run.json`."""
    _write(path, json.loads(path.read_text()) | changes)


def _write(path: Path, record: dict[str, Any]) -> None:
    staging = path.with_suffix(".tmp")
    with staging.open("w") as file:
        file.write(json.dumps(record, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())  # or a power cut leaves an empty record under the right name
    staging.replace(path)


def code_origin() -> dict[str, Any]:
    """Versions, machine and commit."""
    versions = {"python": platform.python_version()} | {p: version(p) for p in _PACKAGES}
    return {"versions": versions, "machine": platform.machine(), "commit": _commit()}


def _commit() -> str | None:
    """The checkout's commit, where there is one."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here), "rev-parse", "HEAD"]
    result = subprocess.run(git, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else None


def command_line() -> list[str]:
    """The command as it was typed."""
    return ["lowbit", *sys.argv[1:]]
