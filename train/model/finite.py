"""All ranks stop together where a number of a step is not finite."""

import math

import torch
from torch import Tensor

from train.model.step import TrainState
from train.runs.outcome import NonFiniteError


def check_finite(loss: Tensor, grad_norm: float, state: TrainState) -> None:
    """Raise NonFiniteError on every rank if either is not finite on any, before an update."""
    bad = not (math.isfinite(grad_norm) and bool(loss.isfinite()))
    if state.world_size > 1:
        flag = torch.tensor(float(bad), device=loss.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        bad = bool(flag)
    if bad:
        raise NonFiniteError(
            f"step {state.step + 1}: gradient norm {grad_norm}, loss {float(loss)} on rank "
            f"{state.rank}; the weights are those of the step before"
        )
