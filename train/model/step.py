"""One optimizer step as functions of values: its loss, its gradients' norm, its update."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from data.module import IGNORED_LABEL
from lowbit import OuterScale, QuantLinear
from train.model.schedule import Cosine, Schedule


@dataclass(frozen=True)
class Optimization:
    """AdamW, linear warm-up, cosine decay; the study's values (arXiv 2510.25602, Table 9)."""

    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    """On matrices; gains of norms and biases have none."""
    warmup_steps: int = 500
    min_lr_ratio: float = 0.1
    """The last learning rate, as a fraction of the peak."""
    max_grad_norm: float = 1.0
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None
    """Of another class than AdamW: its class_path, with init_args but for lr and weight_decay."""
    schedule: Schedule | None = None
    """After the warm-up: Cosine, WSD or Constant of train.model.schedule, or one's own."""

    def __post_init__(self) -> None:
        default = type(self).min_lr_ratio
        if self.schedule and not self.schedule.ends_lower and self.min_lr_ratio != default:
            raise ValueError(
                f"model.optimization.min_lr_ratio={self.min_lr_ratio} has no effect under "
                f"{type(self.schedule).__name__}"
            )
        ranges = {
            "lr": (self.lr, 0 <= self.lr < math.inf, "a finite number from 0 on"),
            "betas": (self.betas, all(0 <= b < 1 for b in self.betas), "two from 0 to below 1"),
            "weight_decay": (
                self.weight_decay,
                0 <= self.weight_decay < math.inf,
                "a finite number from 0 on",
            ),
            "warmup_steps": (self.warmup_steps, self.warmup_steps >= 0, "0 or more"),
            "min_lr_ratio": (self.min_lr_ratio, 0 <= self.min_lr_ratio <= 1, "0 to 1"),
            "max_grad_norm": (
                self.max_grad_norm,
                self.max_grad_norm > 0,
                "above 0 (.inf: no clipping)",
            ),
        }
        for name, (value, is_in_range, expected) in ranges.items():
            if not is_in_range:  # nor is a NaN
                raise ValueError(f"model.optimization.{name}={value}: expected {expected}")


@dataclass(frozen=True)
class TrainState:
    """Where a run stands: all that a step depends on beside weights, optimizer and batches."""

    step: int  #: finished updates
    max_steps: int
    accumulate: int  #: micro-batches of an update, on each rank
    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def of(cls, trainer: Any) -> "TrainState":
        """Of Lightning's trainer, which alone knows it while a run goes on."""
        return cls(
            trainer.global_step,
            trainer.max_steps,
            trainer.accumulate_grad_batches,
            trainer.global_rank,
            trainer.world_size,
            trainer.strategy.root_device,
        )


def logits_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """FP32 [B, S, vocabulary]."""
    logits: Tensor = model(
        input_ids=batch["input_ids"], position_ids=batch.get("position_ids"), use_cache=False
    ).logits
    return logits.float()


def label_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each label in nats, FP32 [B, S]; 0 at ignored positions."""
    losses = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
    )
    return losses.view_as(labels)


def token_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """`label_losses` of what `model` predicts."""
    return label_losses(logits_of(model, batch), batch["labels"])


def apart(model: nn.Module, batch: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    """The batch; its windows one by one where one scale for all tokens of a layer's input would
    make what each predicts depend on those beside it.
    """
    recipes = (module.recipe for module in model.modules() if isinstance(module, QuantLinear))
    inputs = (recipe.fprop_input for recipe in recipes)
    if not any(f is not None and f.outer is OuterScale.TENSOR for f in inputs):
        yield batch
        return
    for index in range(len(batch["input_ids"])):
        own = {name: x[index : index + 1] for name, x in batch.items() if x.dim()}
        yield own | {"first_sample": batch["first_sample"] + index}


def mean_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Over the tokens of a micro-batch that count, nats."""
    losses = token_losses(model, batch)
    return losses.sum() / (batch["labels"] != IGNORED_LABEL).sum()


def mean_over_ranks(x: Tensor, state: TrainState) -> float:
    """All ranks call it; windows have one length, so means over ranks are means over tokens."""
    if state.world_size > 1:
        x = x.clone()
        torch.distributed.all_reduce(x)
        x = x / state.world_size
    return float(x)


def total_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Of the gradients, over all shards."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Scale the gradients, whose norm is `norm`, to `max_norm` where they are above it."""
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


def lr_factor(optimization: Optimization, step: int, max_steps: int) -> float:
    """On the peak learning rate, for the update with this number, from 0."""
    if step < (warmup := optimization.warmup_steps):
        return (step + 1) / warmup
    schedule, steps = optimization.schedule or Cosine(), max(1, max_steps - warmup)
    return schedule.factor(step - warmup, steps, optimization.min_lr_ratio)
