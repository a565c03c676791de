"""How long the collectives of a step take, and how much of that no computing hides."""

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# where a CPU computes; what else the profiler names there may hold a wait for other ranks
COMPUTING = ("aten::", "lowbit::", "Torch-Compiled Region")


class CommunicationProfile:
    """Records what this process does, from now on; on CUDA what its device does.

    Recording slows a process down, so the phases' seconds are not taken in the same step.
    """

    def __init__(self, device: torch.device) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it announces itself on stderr
        self._on_device = device.type == "cuda"
        kind = ProfilerActivity.CUDA if self._on_device else ProfilerActivity.CPU
        self._profile = profile(activities=[kind])
        self._profile.start()

    def stop(self) -> dict[str, float]:
        """`communication_seconds` since the start."""
        self._profile.stop()
        results: Any = self._profile.profiler.kineto_results  # type: ignore[union-attr]  # stopped
        # profile.events() takes 20 times as long
        return communication_seconds(results.events(), on_device=self._on_device)


def communication_seconds(events: Iterable[Any], *, on_device: bool) -> dict[str, float]:
    """Seconds in which a collective was under way, and in which nothing was computed beside it.

    The latter, `communication_exposed`, is what communication adds to the step. A collective is
    NCCL's kernel `on_device`, else gloo's work, and ends once the slowest rank has taken part.
    Computing is any other kernel or copy `on_device`, else an operator.
    """
    collectives, computing = [], []
    for event in events:
        name = event.name()
        if on_device == (event.device_type().name == "CPU"):
            continue
        if name.startswith(("gloo:", "nccl")):
            collectives.append((event.start_ns(), event.end_ns()))
        elif on_device or name.startswith(COMPUTING):
            computing.append((event.start_ns(), event.end_ns()))
    exposed = _covered(collectives + computing) - _covered(computing)
    return {"communication": _covered(collectives) / 1e9, "communication_exposed": exposed / 1e9}


def _covered(intervals: Iterable[tuple[int, int]]) -> int:
    """The length of their union."""
    length = end = 0
    for start, stop in sorted(intervals):
        length += max(0, stop - max(start, end))
        end = max(end, stop)
    return length
