"""The random generators of a process, as values: what dropout and loaders draw from."""

import random
from typing import Any

import torch


def torch_generators() -> dict[str, Any]:
    """PyTorch's, of the CPU and of the current GPU."""
    states: dict[str, Any] = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def generator_states() -> dict[str, Any]:
    """PyTorch's and Python's."""
    return torch_generators() | {"python": random.getstate()}


def restore_generators(states: dict[str, Any]) -> None:
    """Set those that `states` holds; a GPU's, where there is one."""
    torch.set_rng_state(states["torch"])
    if "python" in states:
        random.setstate(states["python"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
