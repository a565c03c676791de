"""One row of metrics per optimizer step, over all its micro-batches and ranks."""

import time
from collections.abc import Mapping

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from train.fit.at_steps import AtSteps
from train.model.module import PretrainModule


class StepMetrics(AtSteps):
    """Logs loss, gradient norm, learning rate, tokens; shows loss and tokens/s in the progress bar.

    It stands before `Checkpoints`, so that a checkpoint never lacks the metrics of its step.
    """

    def on_step_start(self, trainer: Trainer, module: PretrainModule) -> None:
        """The step's time begins."""
        self._began = time.perf_counter()

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: Optimizer
    ) -> None:
        self._lr = optimizer.param_groups[0]["lr"]

    def on_step_end(
        self, trainer: Trainer, module: PretrainModule, batch: Mapping[str, Tensor]
    ) -> None:
        """The step's row."""
        micro_batches = trainer.accumulate_grad_batches * trainer.world_size
        tokens = batch["labels"].numel() * micro_batches
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
