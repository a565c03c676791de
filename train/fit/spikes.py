"""A spike of the loss is reported."""

from collections import deque
from typing import Any

from lightning.pytorch import Trainer

from train.fit.at_steps import AtSteps
from train.model.module import PretrainModule
from train.stats.spikes import WINDOW, mean_before_spike


class SpikeReport(AtSteps):
    """Says when a step's loss stands out from those before it; training goes on.

    By the rule of `train.stats.spikes`.
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def on_step_end(self, trainer: Trainer, module: PretrainModule, batch: Any) -> None:
        """Its loss against those before it."""
        loss = module.step_loss
        mean = mean_before_spike(loss, self._losses)
        if mean is not None and trainer.is_global_zero:
            print(
                f"lowbit: loss spike at step {trainer.global_step}: {loss:.4f}, after a mean of "
                f"{mean:.4f} over {len(self._losses)} steps; training goes on",
                flush=True,
            )
        self._losses.append(loss)

    def state_dict(self) -> dict[str, Any]:
        """The losses so far: a resumed run has the same mean."""
        return {"losses": list(self._losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        self._losses.extend(state_dict["losses"])
