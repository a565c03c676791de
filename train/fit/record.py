"""What a run is made of, into run.json before the first step, and how it ended."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from data.module import TokenDataModule
from lowbit import kernels
from train.distributed.ranks import products_of_all
from train.fit.signals import Preempted
from train.model.module import PretrainModule
from train.model.recipe_table import phase_rows
from train.runs.outcome import NonFiniteError
from train.runs.provenance import code_origin
from train.runs.record import FORMAT_VERSION, has_record, update_record, write_record


class RunRecord(Callback):
    """Keeps `run.json` in `folder` true."""

    def __init__(self, folder: Path, command: list[str]) -> None:
        self._folder = folder
        self._command = command

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Before the first step, or when a run goes on."""
        assert isinstance(module, PretrainModule)
        products = products_of_all(module.device.type)
        if not trainer.is_global_zero:
            return
        if trainer.ckpt_path is None or not has_record(self._folder):
            described = self._describe(trainer, module)
            write_record(self._folder, described | {"bf16_products": products})
        else:
            phases = phase_rows(module.policy, trainer.max_steps)
            update_record(
                self._folder, status="running", max_steps=trainer.max_steps, phases=phases
            )

    def on_exception(
        self, trainer: Trainer, module: LightningModule, exception: BaseException
    ) -> None:
        """How the run ended, unless it was asked to stop."""
        if isinstance(exception, Preempted):
            return  # still running: the next start goes on
        if trainer.is_global_zero and has_record(self._folder):
            status = "diverged" if isinstance(exception, NonFiniteError) else "failed"
            update_record(self._folder, status=status, error=str(exception))

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
