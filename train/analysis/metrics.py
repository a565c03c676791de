"""Statistics as torchmetrics: accumulated over batches, reduced over ranks."""

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import Metric


class Qsnr(Metric):
    """`lowbit.qsnr_db` of everything it was updated with, as if it were one tensor."""

    full_state_update = False
    signal: Tensor
    noise: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("signal", _zero(), dist_reduce_fx="sum")
        self.add_state("noise", _zero(), dist_reduce_fx="sum")

    def update(self, x: Tensor, quantized: Tensor) -> None:
        x = x.double()
        self.signal += x.square().sum()
        self.noise += (x - quantized.double()).square().sum()

    def compute(self) -> Tensor:
        return -10 * torch.log10(self.noise / self.signal)


class MeanStatistic(Metric):
    """A function of `lowbit.stats` of two tensors, averaged over updates, weighted by the number of
    elements.
    """

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self, statistic: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._statistic = statistic
        self.add_state("total", _zero(), dist_reduce_fx="sum")
        self.add_state("weight", _zero(), dist_reduce_fx="sum")

    def update(self, x: Tensor, quantized: Tensor) -> None:
        self.total += self._statistic(x, quantized).double() * x.numel()
        self.weight += x.numel()

    def compute(self) -> Tensor:
        return self.total / self.weight


def _zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)
