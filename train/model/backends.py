"""The backend that a run's options name, in every quantized layer."""

from typing import Literal

from torch import nn

from lowbit import Backend, Emulate, Integer, Keep, LayerPolicy, Randomness, convert_linears
from train.model.controls import Control, SignedError

BackendName = Literal["emulate", "integer"]


def convert(
    model: nn.Module,
    policy: LayerPolicy,
    randomness: Randomness,
    name: BackendName,
    control: Control | None,
    keep: Keep,
) -> None:
    """Convert `model` in place; ValueError for a recipe of any phase that the backend lacks."""
    backend: Backend = Integer() if name == "integer" else Emulate()
    if control == "noise":
        if name != "emulate":
            raise ValueError(f"model.backend={name} with model.control=noise: only emulate has it")
        if keep.quantized_inputs:
            raise ValueError(
                "model.keep.quantized_inputs with model.control=noise, which has no codes"
            )
        backend = SignedError()
    convert_linears(model, policy, backend=backend, randomness=randomness, keep=keep)
    if isinstance(backend, Integer):
        for phase in (None, *policy.phases):
            for recipe in {r for r in policy.resolve(model, phase).values() if r}:
                backend.check(recipe)
