"""AdamW, or another optimizer by its class, over a model's matrices and vectors."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from train.model.step import Optimization

Make = Callable[[Any], Optimizer]
NEEDS_MATRICES = ("Muon",)  # of hidden layers: AdamW takes embeddings, head and vectors


def optimizer_of(model: nn.Module, optimization: Optimization) -> Optimizer:
    """At the peak learning rate, without weight decay on vectors. ValueError for a setting that
    would have no effect.
    """
    make: Make | None = optimization.optimizer
    if make is None:
        return adamw(model.parameters(), optimization)
    kind, defaults = _kind(make)
    _check(kind, defaults, optimization)
    if kind.__name__ not in NEEDS_MATRICES:
        optimizer = make(_groups(model.parameters(), optimization))
    else:
        hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
        own = {id(p) for p in hidden}
        rest = [p for p in model.parameters() if id(p) not in own]
        group = {"params": hidden, "weight_decay": optimization.weight_decay}
        optimizer = Split(make([group]), adamw(rest, optimization))
    for group in optimizer.param_groups:
        group["lr"] = optimization.lr
    return optimizer


def adamw(parameters: Iterable[nn.Parameter], optimization: Optimization) -> Optimizer:
    """The default."""
    groups = _groups(parameters, optimization)
    return torch.optim.AdamW(groups, lr=optimization.lr, betas=optimization.betas, fused=True)


def _groups(parameters: Iterable[nn.Parameter], optimization: Optimization) -> list[dict[str, Any]]:
    parameters = list(parameters)
    decay = optimization.weight_decay
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def _kind(make: Make) -> tuple[type[Optimizer], dict[str, Any]]:
    """The class, and the arguments that it is to be made with."""
    try:
        probe = make([nn.Parameter(torch.zeros(2, 2))])
    except Exception as error:
        text = " ".join(str(error).split())[:120]
        raise ValueError(f"model.optimization.optimizer: {text}") from error
    return type(probe), probe.defaults


def _check(kind: type[Optimizer], defaults: dict[str, Any], optimization: Optimization) -> None:
    """Learning rate and weight decay are the run's, whatever stands among the class's arguments."""
    known = inspect.signature(kind).parameters
    for name in ("lr", "weight_decay"):
        ours = getattr(optimization, name)
        if name not in defaults and ours:
            raise ValueError(f"model.optimization.{name}={ours}: {kind.__name__} has none, set 0")
        given, default = defaults.get(name, ours), getattr(known.get(name), "default", None)
        if given not in (default, ours):
            raise ValueError(
                f"{kind.__name__}'s {name}={given} is not used: set model.optimization.{name}"
            )
    if kind.__name__ not in NEEDS_MATRICES and optimization.betas != Optimization().betas:
        raise ValueError(f"model.optimization.betas is AdamW's: set those of {kind.__name__}")


class Split(Optimizer):
    """Two optimizers as one, each over parameters of its own."""

    def __init__(self, first: Optimizer, rest: Optimizer) -> None:
        for index, part in enumerate(parts := (first, rest)):
            for group in part.param_groups:
                group["part"] = index
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._parts = parts

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Of both; a checkpoint that was loaded has put other groups and states here."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, part in enumerate(self._parts):
            part.param_groups = [g for g in self.param_groups if g["part"] == index]
            part.state = self.state
            part.step()
        return loss
