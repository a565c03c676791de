"""The learning rate as a function of the step."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass


def warmup_cosine(step: int, *, warmup_steps: int, max_steps: int, min_ratio: float) -> float:
    """Factor on the peak learning rate for the update number `step` (0 is the first).

    Linear from 1 / warmup_steps to 1, then half a cosine down to `min_ratio` at the last update.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return Cosine().factor(step - warmup_steps, max(1, max_steps - warmup_steps), min_ratio)


class Schedule(ABC):
    """The learning rate after its warm-up. A class of one's own is one of these, by class_path.

    It holds no state: what the rate of a step is follows from the step, also after a resume.
    """

    @abstractmethod
    def factor(self, step: int, steps: int, min_ratio: float) -> float:
        """On the peak rate, for the update `step` of `steps` after the warm-up, from 0.

        `min_ratio`: what the last update's is to be, `model.optimization.min_lr_ratio`.
        """

    ends_lower = True  #: whether `min_ratio` has an effect


class Cosine(Schedule):
    """Half a cosine, from just below 1 to `min_ratio`."""

    def factor(self, step: int, steps: int, min_ratio: float) -> float:
        """As Schedule has it."""
        cosine = (1 + math.cos(math.pi * min(1.0, (step + 1) / steps))) / 2
        return min_ratio + (1 - min_ratio) * cosine


class Constant(Schedule):
    """The peak rate to the end."""

    ends_lower = False

    def factor(self, step: int, steps: int, min_ratio: float) -> float:
        """As Schedule has it."""
        return 1.0


@dataclass(frozen=True)
class WSD(Schedule):
    """Warm-up, stable, decay (arXiv 2404.06395): the peak rate, then straight down to the end."""

    decay: float = 0.2
    """The last part that decays, of all steps after the warm-up."""

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise ValueError(f"WSD's decay={self.decay}: expected a share above 0, at most 1")

    def factor(self, step: int, steps: int, min_ratio: float) -> float:
        """As Schedule has it."""
        decaying = max(1, round(self.decay * steps))
        done = max(0, step + 1 - (steps - decaying)) / decaying
        return 1 - (1 - min_ratio) * min(1.0, done)
