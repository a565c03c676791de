"""The Lightning module: a Llama model under a policy, AdamW, and what is measured on the way."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from transformers import LlamaConfig, LlamaForCausalLM

from data.module import IGNORED_LABEL
from lowbit import (
    Keep,
    LayerPolicy,
    Phase,
    QuantLinear,
    Randomness,
    Reuse,
    enter_phase,
    unquantized,
)
from train.distributed.fsdp import FullySharded
from train.loggers.rows import log_row
from train.model.backends import BackendName, convert
from train.model.controls import Control, with_keys
from train.model.distillation import Distillation, Teacher
from train.model.finite import check_finite, check_validation
from train.model.first_products import FirstProducts
from train.model.initial import InitialWeights, Undrawn, empty_model
from train.model.optimizer import optimizer_of
from train.model.step import (
    Optimization,
    TrainState,
    apart,
    clip_gradients,
    lr_factor,
    mean_loss,
    mean_over_ranks,
    token_losses,
    total_norm,
)
from train.runs.metrics import perplexity


class PretrainModule(Undrawn):
    """Pretrain a Llama model with its linear layers quantized under `policy`.

    Args:
        llama: The architecture, with the names of transformers' LlamaConfig.
        policy: Which linear layers get which numerics.
        optimization: Optimizer, schedule, clipping.
        init_from: Folder or hub id of pretrained weights to start from, instead of random ones.
        distill_from: A frozen teacher whose predictions are learned, in place of the labels.
        seed: Of the initial weights and of stochastic rounding; the command line sets it.
        gradient_checkpointing: Keep each block's input alone and compute the rest again in the
            backward pass: less memory, the same bits.
        compile_blocks: `torch.compile` of each block: faster on GPUs, sums in another order.
        validate_bf16: Validate the same weights without quantization too, as val/loss_bf16.
        control: Show the noise instead of a recipe. perturbed: initial weights plus 1e-6 of noise;
            noise: operands plus their quantization error with a random sign.
        backend: How quantized operands are multiplied. emulate: their values, by the device's BF16
            GEMM; integer: INT8 codes block by block, on CPUs, for recipes of integers alone.
        keep: What quantized layers hold on to, time against memory; the same losses.
    """

    def __init__(
        self,
        llama: LlamaConfig,
        policy: LayerPolicy,
        optimization: Optimization = Optimization(),
        init_from: str | None = None,
        distill_from: Distillation | None = None,
        seed: int = 0,
        gradient_checkpointing: bool = False,
        compile_blocks: bool = False,
        validate_bf16: bool = False,
        control: Control | None = None,
        backend: BackendName = "emulate",
        keep: Keep = Keep(),
    ) -> None:
        super().__init__()
        own = {"model.keep.quantized_weights": keep.quantized_weights, "seed=step": policy.redraws}
        if compile_blocks and (taken := [what for what, is_on in own.items() if is_on]):
            raise ValueError(f"{taken[0]} with model.compile_blocks: one of them")
        self.control, self.backend, self.keep = control, backend, keep
        policy = with_keys(policy) if control == "noise" else policy
        self.policy, self.optimization = policy, optimization
        self.init_from, self.seed = init_from, seed
        self.gradient_checkpointing, self.compile_blocks = gradient_checkpointing, compile_blocks
        self.randomness = Randomness(seed)
        self.reuse = Reuse()  #: nobody else writes to weights or activations during our steps
        self._products = FirstProducts()
        self.model: LlamaForCausalLM = self._convert(empty_model(llama))  #: without weights so far
        optimizer_of(self.model, optimization)  # raises before anything is written
        self.initial = InitialWeights(self.model.config, seed, init_from, control)
        vocabulary = self.model.config.vocab_size
        self.teacher = Teacher(distill_from, vocabulary) if distill_from else None
        self._phase: Phase | None = None
        self._loaded_step, self.validate_bf16 = 0, validate_bf16
        # a NaN counts: torchmetrics would leave it out of the mean, and the rest would look well
        self.val_loss = MeanMetric(nan_strategy="disable").set_dtype(torch.float64)
        self.val_loss_bf16 = MeanMetric(nan_strategy="disable").set_dtype(torch.float64)
        self.loss_sum = torch.zeros((), dtype=torch.float64)  #: over the step's micro-batches
        self.step_loss = math.nan  #: their mean, over the ranks too, once the step has it
        self.grad_norm = math.nan  #: of the step, before clipping
        self.standing: TrainState | None = None  #: where no trainer tells it
        self.validation: dict[str, float] = {}  #: the last validation's results

    def _convert(self, model: LlamaForCausalLM) -> LlamaForCausalLM:
        self.randomness = Randomness(self.seed)  # each conversion takes streams of its own
        convert(model, self.policy, self.randomness, self.backend, self.control, self.keep)
        if self.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if self.compile_blocks:
            self._products.check_empty(model, self.policy)
            for block in model.model.layers:
                block.compile()
        return model

    def configure_model(self) -> None:
        """Give the model its weights, once Lightning has brought the processes together.

        They are drawn on the CPU whatever the device. For FSDP2 rank 0 alone draws them.
        """
        if not next(self.model.parameters()).is_meta:
            return
        strategy = None if self.standing else self.trainer.strategy
        if isinstance(strategy, FullySharded):
            strategy.shard(self.model, None if self.state.rank else self.initial.draw())
        else:
            self.model = self._convert(self.initial.draw(hashed=self.state.rank == 0))

    @property
    def state(self) -> TrainState:
        """Where the run stands."""
        return self.standing or TrainState.of(self.trainer)

    @property
    def quantized_layers(self) -> dict[str, QuantLinear]:
        """The layers under a recipe, by name."""
        modules = self.model.named_modules()
        return {name: module for name, module in modules if isinstance(module, QuantLinear)}

    def on_train_start(self) -> None:
        """The learning rate is the schedule's, not what a checkpoint of another horizon holds."""
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.optimization.lr * self.lr_factor(self.trainer.global_step)

    def on_train_batch_start(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """A step's loss begins at zero with its first micro-batch."""
        state = self.state
        if batch_idx % state.accumulate == 0:
            self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self._enter_step(state.step, batch)
        if not self.compile_blocks:
            self._products.count(self.model)

    def on_after_backward(self) -> None:
        """ValueError where the first micro-batch computed something else than the recipes say."""
        self._products.check(self.model, self.policy, self._phase)

    def _enter_step(self, step: int, batch: Mapping[str, Tensor]) -> None:
        """Take the recipes and random numbers of the update number `step`, counted from 0."""
        phase = self.policy.phase_at(step, self.state.max_steps)
        if phase != self._phase:
            enter_phase(self.model, self.policy, phase)
            self._phase = phase
        self.randomness.set(step, batch["first_sample"] * batch["input_ids"].shape[1])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Which step's weights are validated."""
        self._loaded_step = checkpoint["global_step"]  # the trainer's stays 0 when it validates

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The micro-batch's mean loss, which adds to that of the step."""
        loss = self.mean_loss(batch)
        self.loss_sum += loss.detach().double()
        return loss

    def mean_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Over the tokens that count, nats."""
        with self.reuse:
            return (self.teacher.loss if self.teacher else mean_loss)(self.model, batch)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """All micro-batches are done: the step's loss and norm are known, checked, and used."""
        parameters, state = list(self.model.parameters()), self.state
        norm = total_norm(parameters)
        self.grad_norm = float(norm)
        check_finite(self.loss_sum, self.grad_norm, state)  # clipping spreads what is not
        self.step_loss = mean_over_ranks(self.loss_sum / state.accumulate, state)
        clip_gradients(parameters, self.optimization.max_grad_norm, norm)

    def log_row(self, metrics: Mapping[str, float]) -> None:
        """To the run's own loggers."""
        log_row(self.loggers, metrics, self.trainer.global_step)

    def on_validation_epoch_start(self) -> None:
        self.reuse.forget()  # callbacks may have swapped the weights (averages)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The losses of the tokens, FP32 [B, S], whatever the batch."""
        step = max(self.state.step, self._loaded_step, 1) - 1  # as the last update computed
        self._enter_step(step, batch)
        found = []
        for part in apart(self.model, batch):
            self._enter_step(step, part)
            found.append(self._validate(part, self.val_loss))
        if self.validate_bf16:
            with unquantized(self.model):
                self._validate(batch, self.val_loss_bf16)
        return torch.cat(found)

    def _validate(self, batch: Mapping[str, Tensor], metric: Metric) -> Tensor:
        """A batch of padding is computed too: under FSDP2 all ranks must gather together."""
        with self.reuse:
            losses = token_losses(self.model, batch)
        tokens = (batch["labels"] != IGNORED_LABEL).sum()
        if tokens:
            metric.update(losses.sum().double() / tokens, weight=tokens)
        return losses

    def on_validation_epoch_end(self) -> None:
        """The results, to every logger."""
        self.reuse.forget()
        losses = {"val/loss": float(self.val_loss.compute())}
        self.val_loss.reset()
        if self.validate_bf16:
            losses["val/loss_bf16"] = float(self.val_loss_bf16.compute())
            self.val_loss_bf16.reset()
        self.validation = losses | {"val/perplexity": perplexity(losses["val/loss"])}
        self.log_row(self.validation)
        self.log("val_loss", losses["val/loss"], prog_bar=True, logger=False)
        check_validation(losses, self.state)

    def lr_factor(self, step: int) -> float:
        """On the peak learning rate, for the update with this number, from 0."""
        return lr_factor(self.optimization, step, self.state.max_steps)

    def configure_optimizers(self) -> Any:
        """The learning rate is a function of the step."""
        optimizer = optimizer_of(self.model, self.optimization)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
