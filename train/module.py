"""The Lightning module: a Llama model under a policy, AdamW, and what is measured on the way."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import LlamaConfig, LlamaForCausalLM

from data.module import IGNORED_LABEL
from lowbit import LayerPolicy, QuantLinear, Randomness, convert_linears
from train.initial import build_model
from train.schedule import warmup_cosine


class NonFiniteError(RuntimeError):
    """The loss or the gradient norm is not a finite number; raised before the optimizer step."""


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


def token_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Negative log-likelihood of each label in nats, FP32 [B, S]; 0 at ignored positions."""
    logits = model(
        input_ids=batch["input_ids"], position_ids=batch.get("position_ids"), use_cache=False
    ).logits
    losses = F.cross_entropy(
        logits.float().flatten(0, 1),
        batch["labels"].flatten(),
        ignore_index=IGNORED_LABEL,
        reduction="none",
    )
    return losses.view_as(batch["labels"])


class PretrainModule(LightningModule):
    """Pretrain a Llama model with its linear layers quantized under `policy`."""

    def __init__(
        self,
        llama: LlamaConfig,
        policy: LayerPolicy,
        optimization: Optimization = Optimization(),
        init_from: str | None = None,
        seed: int = 0,
    ) -> None:
        """Args:
        llama: The architecture, with the names of transformers' LlamaConfig.
        policy: Which linear layers get which numerics.
        optimization: Optimizer, schedule, clipping.
        init_from: Folder or hub id of pretrained weights to start from, instead of random ones.
        seed: Of the initial weights and of stochastic rounding; the command line sets it.
        """
        super().__init__()
        self.policy, self.optimization = policy, optimization
        self.init_from, self.seed = init_from, seed
        self.model: LlamaForCausalLM = build_model(llama, init_from, seed)
        self.randomness = Randomness(seed)
        convert_linears(self.model, policy, randomness=self.randomness)
        self.val_loss = MeanMetric().set_dtype(torch.float64)
        self.loss_sum = torch.zeros((), dtype=torch.float64)  #: over the step's micro-batches
        self.grad_norm = math.nan  #: of the step, before clipping
        self.validation: dict[str, float] = {}  #: the last validation's results

    @property
    def quantized_layers(self) -> dict[str, QuantLinear]:
        """The layers under a recipe, by name."""
        modules = self.model.named_modules()
        return {name: module for name, module in modules if isinstance(module, QuantLinear)}

    # --- training -------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        first_row = batch["first_sample"] * batch["input_ids"].shape[1]
        self.randomness.set(self.trainer.global_step, first_row)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        losses = token_losses(self.model, batch)
        loss = losses.sum() / (batch["labels"] != IGNORED_LABEL).sum()
        self.loss_sum += loss.detach().double()
        return loss

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.optimization.max_grad_norm)
        self.grad_norm = float(norm)
        if not math.isfinite(self.grad_norm) or not self.loss_sum.isfinite():
            raise NonFiniteError(
                f"step {self.trainer.global_step + 1}: gradient norm {self.grad_norm}, "
                f"loss {float(self.loss_sum)}; the weights are those of the step before"
            )

    def log_row(self, metrics: Mapping[str, float]) -> None:
        """To every logger at full precision, at the number of finished optimizer steps."""
        for logger in self.loggers:
            logger.log_metrics(dict(metrics), step=self.trainer.global_step)

    # --- validation -----------------------------------------------------------------------------

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        tokens = (batch["labels"] != IGNORED_LABEL).sum()
        if tokens:
            self.val_loss.update(
                token_losses(self.model, batch).sum().double() / tokens, weight=tokens
            )

    def on_validation_epoch_end(self) -> None:
        loss = float(self.val_loss.compute())
        self.val_loss.reset()
        self.validation = {"val/loss": loss, "val/perplexity": math.exp(loss)}
        self.log_row(self.validation)
        self.log("val_loss", loss, prog_bar=True, logger=False)

    # --- optimizer ----------------------------------------------------------------------------

    def lr_factor(self, step: int) -> float:
        """On the peak learning rate, for the update with this number, from 0."""
        return warmup_cosine(
            step,
            warmup_steps=self.optimization.warmup_steps,
            max_steps=self.trainer.max_steps,
            min_ratio=self.optimization.min_lr_ratio,
        )

    def configure_optimizers(self) -> Any:
        parameters = list(self.model.parameters())
        matrices = [p for p in parameters if p.ndim >= 2]
        vectors = [p for p in parameters if p.ndim < 2]
        optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": self.optimization.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=self.optimization.lr,
            betas=self.optimization.betas,
            fused=True,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
