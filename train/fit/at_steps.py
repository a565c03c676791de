"""Lightning calls callbacks at micro-batches; ours mostly want optimizer steps."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from train.model.module import PretrainModule


class AtSteps(Callback):
    """Calls `on_step_start` and `on_step_end` once an optimizer step."""

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Mapping[str, Tensor], batch_idx: int
    ) -> None:
        """A step begins with its first micro-batch."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            assert isinstance(module, PretrainModule)
            self.on_step_start(trainer, module)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        module: LightningModule,
        outputs: Any,
        batch: Mapping[str, Tensor],
        batch_idx: int,
    ) -> None:
        """It ends with its last one."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            assert isinstance(module, PretrainModule)
            self.on_step_end(trainer, module, batch)

    def on_step_start(self, trainer: Trainer, module: PretrainModule) -> None:
        """Before the first micro-batch."""

    def on_step_end(
        self, trainer: Trainer, module: PretrainModule, batch: Mapping[str, Tensor]
    ) -> None:
        """After the update; `batch` is the last micro-batch."""
