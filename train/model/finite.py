"""All ranks stop together where a number of a step, or what it leaves, is not finite."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from train.model.step import TrainState
from train.runs.outcome import NonFiniteError


def check_finite(loss: Tensor, grad_norm: float, state: TrainState) -> None:
    """Raise NonFiniteError on every rank if either is not finite on any, before an update."""
    if _on_any_rank(not (math.isfinite(grad_norm) and bool(loss.isfinite())), state):
        raise NonFiniteError(
            state.step + 1,
            f"gradient norm {grad_norm}, loss {float(loss)} on rank {state.rank}; the weights are "
            "those of the step before",
        )


def check_kept(kept: Iterable[tuple[str, Tensor]], state: TrainState) -> None:
    """Raise NonFiniteError on every rank if a tensor that outlasts the step (a weight, a moment of
    the optimizer) is not finite on any: what is saved or exported is what can be gone on with.
    """
    bad = next((name for name, tensor in kept if not is_finite(tensor)), None)
    if _on_any_rank(bad is not None, state):
        raise NonFiniteError(
            state.step,
            f"it left {bad or 'a part on another rank'} not finite, on rank {state.rank}; neither "
            "saved nor exported",
        )


def is_finite(tensor: Tensor) -> bool:
    """Of a shard this rank's own part; one pass, and no memory for it."""
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if not own.numel() or not own.is_floating_point():
        return True
    return all(bool(end.isfinite()) for end in own.detach().aminmax())  # a NaN is both ends


def check_validation(losses: dict[str, float], state: TrainState) -> None:
    """Raise NonFiniteError for a validation loss that is not; it is the same on every rank."""
    for name, loss in losses.items():
        if not math.isfinite(loss):
            raise NonFiniteError(state.step, f"{name} is {loss}")


def _on_any_rank(bad: bool, state: TrainState) -> bool:
    if state.world_size > 1:
        flag = torch.tensor(float(bad), device=state.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        bad = bool(flag)
    return bad
