"""The microscope: what formats do to the operands and gradients of a run, while it trains.

Asked for with `diagnostics:` in a run's YAML, absent without it. It reads and changes nothing:
losses and weights are those of the run without it, bit for bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lowbit import BlockFormat, QuantRecipe, unquantized
from lowbit.gradient_stats import STATISTICS, gradient_error
from lowbit.recipe import OPERANDS
from train.loggers.event_log import EventLog
from train.microscope.layers import chosen_linears, place_of
from train.microscope.measuring import StepMeasurement
from train.microscope.store import DiagnosticsStore, Rows
from train.model.generators import restore_generators, torch_generators
from train.model.module import PretrainModule


@dataclass(frozen=True)
class Diagnostics:
    """What the microscope looks at, and when."""

    formats: tuple[BlockFormat, ...] = ()
    """What-if formats, looked at beside the one an operand is trained in."""
    layers: tuple[str, ...] = ("*layers*",)
    """Linear layers, by globs of their names."""
    operands: tuple[str, ...] = ("*",)
    """Globs of operands: `wgrad_*` is a GEMM, `*_weight` both copies of the weight."""
    every_n_steps: int = 10
    windows: tuple[tuple[int, int], ...] = ()
    """First and last step of each, both included; none: the whole run."""
    gradients: bool = True
    """Compare the weights' gradients with those of the same batch without quantization, where the
    recipe quantizes: one more forward and backward pass."""

    def __post_init__(self) -> None:
        if self.every_n_steps < 1:
            raise ValueError(f"diagnostics.every_n_steps={self.every_n_steps}: at least 1")
        for first, last in self.windows:
            if last // self.every_n_steps * self.every_n_steps < max(first, 1):
                raise ValueError(
                    f"diagnostics.windows: {first} to {last} holds no multiple of "
                    f"every_n_steps={self.every_n_steps}"
                )
        for pattern in self.operands:
            if not any(fnmatchcase(operand, pattern) for operand in OPERANDS):
                raise ValueError(f"diagnostics.operands: {pattern!r} matches none of {OPERANDS}")
        if len(set(self.formats)) < len(self.formats):
            raise ValueError(f"diagnostics.formats names one twice: {[*map(str, self.formats)]}")

    def wants(self, step: int) -> bool:
        """Whether the step with this number, from 1, is looked at."""
        inside = any(first <= step <= last for first, last in self.windows) or not self.windows
        return inside and step % self.every_n_steps == 0

    def chosen_layers(self, model: nn.Module) -> dict[str, nn.Linear]:
        """By name; ValueError for a pattern that matches none."""
        try:
            return chosen_linears(model, self.layers)
        except ValueError as error:
            raise ValueError(f"diagnostics.layers: {error}") from None

    @property
    def chosen_operands(self) -> tuple[str, ...]:
        """In the order of OPERANDS."""
        chosen = (o for o in OPERANDS if any(fnmatchcase(o, glob) for glob in self.operands))
        return tuple(chosen)


class Microscope(Callback):
    """Looks at all micro-batches of the steps that `plan` names, on all ranks together.

    Step numbers are those of metrics.csv: finished optimizer steps. Results are in the run folder:
    `diagnostics/*.parquet`, and summaries for TensorBoard.
    """

    def __init__(self, plan: Diagnostics, module: PretrainModule, run_dir: Path) -> None:
        self.asked = plan
        self.layers = plan.chosen_layers(module.model)  # a pattern's error comes before training
        self.store = DiagnosticsStore(run_dir / "diagnostics")
        self._measurement: StepMeasurement | None = None
        self._references: list[Tensor] | None = None
        self._batch: Mapping[str, Tensor] = {}
        self._generators: dict[str, Any] = {}
        self._board: Any = None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Forget what was measured after the step that the run goes on from."""
        assert isinstance(module, PretrainModule)
        self.layers = self.asked.chosen_layers(module.model)  # with weights, since configure_model
        sharded = any(isinstance(layer.weight, DTensor) for layer in self.layers.values())
        if self.asked.gradients and sharded:
            raise ValueError("diagnostics.gradients with sharded weights: set it to false")
        if trainer.is_global_zero:
            self.store.cut_back(trainer.global_step)

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Hook the layers for a step that is looked at."""
        if not self.asked.wants(trainer.global_step + 1):
            return
        if self._measurement is None:
            self._measurement = StepMeasurement(
                self.layers, self.asked.chosen_operands, self.asked.formats
            )
            self._references = None
        self._measurement.begin_micro_batch()
        self._batch, self._generators = batch, torch_generators()

    def on_after_backward(self, trainer: Trainer, module: LightningModule) -> None:
        """After each micro-batch, before any weight moves."""
        if self._measurement is None:
            return
        assert isinstance(module, PretrainModule)
        self._measurement.end_micro_batch()
        recipes = (layer.recipe for layer in module.quantized_layers.values())
        if self.asked.gradients and any(recipe != QuantRecipe() for recipe in recipes):
            self._add_references(trainer, module)

    def _add_references(self, trainer: Trainer, module: PretrainModule) -> None:
        """Gradients of this micro-batch without quantization, with the same dropout."""
        weights = [layer.weight for layer in self.layers.values()]
        devices = [module.device] if module.device.type == "cuda" else []
        with torch.random.fork_rng(devices), unquantized(module.model):
            restore_generators(self._generators)
            with trainer.precision_plugin.forward_context():
                loss = module.mean_loss(self._batch) / trainer.accumulate_grad_batches
            found = torch.autograd.grad(loss, weights)
        before = self._references or [torch.zeros_like(g) for g in found]
        self._references = [a + g for a, g in zip(before, found, strict=True)]

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: Any
    ) -> None:
        """The gradients are whole and not yet clipped."""
        if self._measurement is None:
            return
        step = trainer.global_step + 1
        tables: dict[str, Rows] = {"operands": self._measurement.rows(trainer)}
        if self._references is not None:
            tables["gradients"] = self._gradient_rows(trainer)
        histograms = self._measurement.crest_histograms(trainer)
        self._measurement = self._references = None
        if not trainer.is_global_zero:
            return
        for name, rows in tables.items():
            self.store.write(name, step, rows)
        for logger in trainer.loggers:
            if isinstance(logger, EventLog):
                from train.microscope.board import Board

                self._board = self._board or Board(logger.experiment)
                self._board.show(step, tables, histograms)

    def _gradient_rows(self, trainer: Trainer) -> Rows:
        assert self._references is not None
        rows = []
        for (name, layer), g in zip(self.layers.items(), self._references, strict=True):
            assert layer.weight.grad is not None
            error = gradient_error(trainer.strategy.reduce(g, reduce_op="mean"), layer.weight.grad)
            found = {statistic: float(getattr(error, statistic)) for statistic in STATISTICS}
            rows.append(place_of(name) | found)
        return rows
