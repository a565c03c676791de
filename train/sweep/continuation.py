"""One continuation of a checkpoint, step for step as `lowbit fit` would take it."""

import copy
import math
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from data.module import TokenDataModule
from lowbit import Randomness
from train.checkpoints.folder import load_state, step_of
from train.config.layers import put, spelt_out
from train.config.policies import check_name, read_policy
from train.config.strict_yaml import read_yaml
from train.model.controls import perturb
from train.model.module import PretrainModule
from train.model.section import read_module
from train.model.step import TrainState
from train.runs.outcome import NonFiniteError
from train.sweep.request import Variant

PRECISIONS = {"32-true": False, "bf16-mixed": True}  # whether autocast is on


class Outcome(NamedTuple):
    """Of a branch's end: validation losses, and where the weights went."""

    loss: float
    windows: tuple[float, ...]  #: mean over each window's tokens
    shifts: tuple[float, ...]  #: of each block's linear layers: mean change over mean size of it


def build_module(config: dict[str, Any], variant: Variant) -> PretrainModule:
    """The run's own model under the variant's recipe and changes."""
    return read_module(arm_section(config, variant))


def arm_section(config: dict[str, Any], variant: Variant) -> dict[str, Any]:
    """The model section of it."""
    own = read_yaml(variant.recipe)
    if set(own) != {"model"} or not set(own["model"]) <= {"policy", "control"}:
        raise ValueError(f"{variant.recipe}: a branch can take model.policy and model.control only")
    model: dict[str, Any] = copy.deepcopy(config["model"])
    model |= {"control": None, "init_from": None} | own["model"]
    model["policy"] = spelt_out(model["policy"])
    check_name(read_policy(model["policy"]), model["control"])
    for key, value in variant.changes.items():
        if not key.startswith("model."):
            raise ValueError(f"override {key}: a branch can change keys of model alone")
        put(model, key.removeprefix("model."), value)
    return model


class Continuation:
    """The `horizon` steps after a checkpoint on the batches of `seed`, for one module at a time.

    With the run's own seed they are the run's own steps, but for dropout, which `seed` draws.
    """

    def __init__(self, checkpoint: Path, config: dict[str, Any], seed: int, horizon: int) -> None:
        trainer = config["trainer"]
        if trainer["precision"] not in PRECISIONS:
            raise ValueError(f"trainer.precision={trainer['precision']}, not of {[*PRECISIONS]}")
        self._autocast = PRECISIONS[trainer["precision"]]
        self._device = torch.accelerator.current_accelerator() or torch.device("cpu")
        if trainer["accelerator"] == "cpu":
            self._device = torch.device("cpu")
        self._saved, self._first = load_state(checkpoint), step_of(checkpoint)
        self._seed, self._horizon = seed, horizon
        accumulate = trainer["accumulate_grad_batches"]
        self._begin = TrainState(
            self._first, trainer["max_steps"], accumulate, rank=0, world_size=1, device=self._device
        )
        chosen = {"val_choice": "first"}  # by runs that do not say
        data = TokenDataModule(**chosen | config["data"] | {"seed": seed, "num_workers": 0})
        data.trainer = SimpleNamespace(  # type: ignore[assignment]  # what it asks of one
            global_step=self._first,
            accumulate_grad_batches=accumulate,
            world_size=1,
            global_rank=0,
            strategy=SimpleNamespace(root_device=self._device),
        )
        data.setup("fit")
        self._data = data
        self._batches = list(islice(data.train_dataloader(), horizon * accumulate))
        self._validation: Any = data.val_dataloader()

    @cached_property
    def windows(self) -> dict[str, list[int]]:
        """Those of the validation split that are evaluated, and the documents they begin in."""
        ids = np.concatenate([batch["window"].numpy() for batch in self._validation])
        ids = ids[ids >= 0]
        documents = self._data.documents(ids)
        return {"ids": ids.tolist(), "documents": documents.tolist()}

    def run(self, module: PretrainModule, judge: PretrainModule) -> Outcome | None:
        """Validation of the weights that `module` ends with, under `judge`'s numerics.

        None if it diverged.
        """
        optimizer = self._restore(module)
        try:
            for step in range(self._horizon):
                self._step(module, optimizer, step)
        except NonFiniteError:
            return None
        optimizer.zero_grad()  # gradients of many arms are memory
        return self._validate(module, judge, self._shifts(module))

    def _restore(self, module: PretrainModule) -> torch.optim.Optimizer:
        module.standing = self._begin
        module.configure_model()
        module.load_state_dict(self._saved["state_dict"])
        if module.control == "perturbed":
            perturb(module.model, self._seed)
        for layer in module.quantized_layers.values():
            layer.randomness = module.randomness = Randomness(self._seed)
        module.to(self._device).train()
        torch.manual_seed(self._seed)
        optimizer: torch.optim.Optimizer = module.configure_optimizers()["optimizer"]
        (saved,) = self._saved["optimizer_states"]  # its moments, under this module's settings
        groups = optimizer.state_dict()["param_groups"]
        moments = copy.deepcopy(saved["state"])  # which it would update in place
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
        return optimizer

    def _step(self, module: PretrainModule, optimizer: torch.optim.Optimizer, step: int) -> None:
        state = replace(self._begin, step=self._first + step)
        module.standing, accumulate = state, state.accumulate
        for group in optimizer.param_groups:
            group["lr"] = module.optimization.lr * module.lr_factor(state.step)
        optimizer.zero_grad()
        for index in range(step * accumulate, (step + 1) * accumulate):
            batch = {name: x.to(self._device) for name, x in self._batches[index].items()}
            module.on_train_batch_start(batch, index)
            with self._precision():
                loss = module.training_step(batch, index)
            (loss / accumulate).backward()  # type: ignore[no-untyped-call]  # torch's
        module.configure_gradient_clipping(optimizer)
        optimizer.step()

    @torch.no_grad()
    def _validate(
        self, module: PretrainModule, judge: PretrainModule, shifts: tuple[float, ...]
    ) -> Outcome | None:
        judge.standing = replace(self._begin, step=self._first + self._horizon)
        judge.configure_model()
        judge.load_state_dict(module.state_dict())
        judge.to(self._device).eval()
        windows: list[float] = []
        for index, batch in enumerate(self._validation):
            with self._precision():
                there = {k: x.to(self._device) for k, x in batch.items()}
                losses = judge.validation_step(there, index)
            windows += losses[batch["window"] >= 0].double().mean(1).tolist()
        loss = float(judge.val_loss.compute())
        judge.val_loss.reset()
        return Outcome(loss, tuple(windows), shifts) if math.isfinite(loss) else None

    @torch.no_grad()
    def _shifts(self, module: PretrainModule) -> tuple[float, ...]:
        """-1 or 1: all weights of the layer went one way; 0: as far up as down."""
        head = module.model.lm_head
        found = []
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Linear) and layer is not head:
                before = self._saved["state_dict"][f"{name}.weight"].to(self._device)
                change = (layer.weight - before).double()
                found.append(float(change.sum() / change.abs().sum()))
        return tuple(found)

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast)
