"""The diagnosis that a run leaves when non-finite numbers stop it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from data.durable import write_durably
from train.model.finite import is_finite
from train.model.module import PretrainModule
from train.runs.outcome import NonFiniteError


class NonFiniteReport(Callback):
    """Writes `nonfinite-step-<n>-rank<r>.json`: whose samples, and the first bad tensor."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._batches: list[Mapping[str, Tensor]] = []

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Mapping[str, Tensor], batch_idx: int
    ) -> None:
        """Remember the micro-batches of the step."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._batches = []
        self._batches.append(batch)

    def on_exception(
        self, trainer: Trainer, module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the diagnosis."""
        if not isinstance(exception, NonFiniteError):
            return
        assert isinstance(module, PretrainModule)
        step, rank = exception.step, trainer.global_rank
        report = {
            "step": step,
            "rank": rank,
            "windows": [batch["window"].tolist() for batch in self._batches],
            "grad_norm": str(module.grad_norm),  # JSON has no word for these numbers
            "first_non_finite": _first_non_finite(module, self._batches),
            "message": str(exception),
        }
        path = self._folder / f"nonfinite-step-{step:08d}-rank{rank}.json"
        write_durably(path, json.dumps(report, indent=2) + "\n")
        print(f"lowbit: diagnosis in {path}", flush=True)


def _first_non_finite(
    module: PretrainModule, batches: list[Mapping[str, Tensor]]
) -> dict[str, Any] | None:
    """In the order of cause and effect: a parameter, an output of the forward pass, a gradient.

    Every micro-batch is run again, whatever was found before: all ranks must gather sharded weights
    equally often. Of sharded tensors each rank looks at its own part.
    """
    model = module.model
    found: list[dict[str, Any]] = []
    for name, parameter in model.named_parameters():
        if not is_finite(parameter):
            found.append({"tensor": "parameter", "layer": name})
    for index, batch in enumerate(batches):
        with module.trainer.precision_plugin.forward_context():
            layer = _first_bad_output(model, batch)
        if layer is not None:
            found.append({"tensor": "output", "layer": layer, "micro_batch": index})
    for name, parameter in reversed(list(model.named_parameters())):  # backward starts at the end
        if parameter.grad is not None and not is_finite(parameter.grad):
            found.append({"tensor": "gradient", "layer": name})
    return found[0] if found else None


@torch.no_grad()
def _first_bad_output(model: nn.Module, batch: Mapping[str, Tensor]) -> str | None:
    """Run the micro-batch again; the layer that first yields a non-finite number."""
    found: list[str] = []

    def hook(name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, Tensor) and not tensor.isfinite().all():
                found.append(name)

        return look

    hooks = [m.register_forward_hook(hook(name)) for name, m in model.named_modules() if name]
    try:
        model(input_ids=batch["input_ids"], position_ids=batch.get("position_ids"), use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    return found[0] if found else None
