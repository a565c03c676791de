"""Whether a text shares tokens with the one that a model was calibrated on."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

LENGTH, ONE_IN = 32, 16  # tokens of a run that is looked for; how many runs one is kept of


def fingerprints(tokens: Tensor) -> list[str]:
    """Hashes (hex) of one in 16 of all runs of 32 tokens of [windows, tokens], chosen by the hash.

    Two texts that share n + 31 tokens in a row share n runs, and one that is kept with probability
    1 - (15/16)^n: of a window of 512 they are missed once in 10^13.
    """
    runs = np.concatenate([_hashes(row) for row in tokens.cpu().numpy().astype(np.uint64)])
    return [f"{value:016x}" for value in np.unique(runs[runs % ONE_IN == 0]).tolist()]


def _hashes(row: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Of every run: a polynomial in 2^64, mixed (splitmix64's finalizer)."""
    count = max(0, len(row) - LENGTH + 1)
    found = np.zeros(count, np.uint64)
    with np.errstate(over="ignore"):
        for i in range(LENGTH):
            found = found * np.uint64(0x9E3779B97F4A7C15) + row[i : i + count] + np.uint64(1)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            found = (found ^ (found >> np.uint64(shift))) * np.uint64(factor)
    return found ^ (found >> np.uint64(31))


def refuse_overlap(method: Mapping[str, Any], tokens: Tensor, what: str) -> None:
    """ValueError where the text `tokens` [windows, tokens] holds what a model that was quantized by
    this `method` (of its quantization.json) was calibrated on; `what` is read, for a person.
    """
    calibration = method.get("calibration")
    if not calibration:
        return
    shared = set(calibration["fingerprints"]).intersection(fingerprints(tokens))
    if shared:
        raise ValueError(
            f"{what} shares runs of {LENGTH} tokens with the text that the model was calibrated on "
            f"({calibration['text']}): evaluate on another"
        )
