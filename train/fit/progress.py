"""A progress bar in optimizer steps, with the time left."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm


class Progress(Callback):
    """Shows step, loss, validation loss and tokens/s; Lightning's own bars count micro-batches of
    an epoch, and our epochs have no end.
    """

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Where the run stands."""
        self._bar = tqdm(
            total=trainer.max_steps,
            initial=trainer.global_step,
            desc="training",
            unit="step",
            disable=not trainer.is_global_zero,
        )

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Once an optimizer step."""
        if trainer.global_step > self._bar.n:
            values = trainer.progress_bar_metrics
            self._bar.set_postfix(
                {name: f"{float(v):.4g}" for name, v in values.items()}, refresh=False
            )
            self._bar.update()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Close the bar."""
        self._bar.close()

    def on_exception(
        self, trainer: Trainer, module: LightningModule, exception: BaseException
    ) -> None:
        """Close the bar."""
        if hasattr(self, "_bar"):
            self._bar.close()
