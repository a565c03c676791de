"""The learning rate as a function of the step."""

import math


def warmup_cosine(step: int, *, warmup_steps: int, max_steps: int, min_ratio: float) -> float:
    """Factor on the peak learning rate for the update number `step` (0 is the first).

    Linear from 1 / warmup_steps to 1, then half a cosine down to `min_ratio` at the last update.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps + 1) / max(1, max_steps - warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return min_ratio + (1 - min_ratio) * cosine
