"""One row of metrics per optimizer step, over all its micro-batches and ranks."""

import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from train.model.module import PretrainModule


class StepMetrics(Callback):
    """Logs loss, gradient norm, learning rate, tokens; shows loss and tokens/s in the progress bar.

    It stands before `Checkpoints`, so that a checkpoint never lacks the metrics of its step.
    """

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Mapping[str, Tensor], batch_idx: int
    ) -> None:
        """The step's time begins with its first micro-batch."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._began = time.perf_counter()

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: Optimizer
    ) -> None:
        self._lr = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(
        self,
        trainer: Trainer,
        module: LightningModule,
        outputs: Any,
        batch: Mapping[str, Tensor],
        batch_idx: int,
    ) -> None:
        """Once an optimizer step."""
        assert isinstance(module, PretrainModule)
        accumulation = trainer.accumulate_grad_batches
        if (batch_idx + 1) % accumulation:
            return
        tokens = batch["labels"].numel() * accumulation * trainer.world_size
        row = {
            "tokens_seen": trainer.global_step * tokens,
            "train/loss": module.step_loss,
            "grad_norm": module.grad_norm,
            "lr": float(self._lr),
            "tokens_per_second": tokens / (time.perf_counter() - self._began),
        }
        module.log_row(row)
        module.log("loss", row["train/loss"], prog_bar=True, logger=False)
        module.log("tok/s", row["tokens_per_second"], prog_bar=True, logger=False)
