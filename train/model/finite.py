"""All ranks stop together where a number of a step is not finite."""

import math

import torch
from torch import Tensor

from train.runs.outcome import NonFiniteError


def check_finite(loss: Tensor, grad_norm: float, step: int, rank: int, world_size: int) -> None:
    """Raise NonFiniteError on every rank if either is not finite on any; `step` counts from 1."""
    bad = not (math.isfinite(grad_norm) and bool(loss.isfinite()))
    if world_size > 1:
        flag = torch.tensor(float(bad), device=loss.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        bad = bool(flag)
    if bad:
        raise NonFiniteError(
            f"step {step}: gradient norm {grad_norm}, loss {float(loss)} on rank {rank}; the "
            "weights are those of the step before"
        )
