"""What a run of curve.py notes down, and the weights that it starts its steps from."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from train.model.module import PretrainModule


class Recorder:
    """What a run did: by step its windows, weights before, gradients; the codes of the last."""

    def __init__(self, start: Path | None, perturb: float, last: int) -> None:
        self.start = torch.load(start)["weights"] if start else None
        self.perturb, self.last = perturb, last
        self.initial: dict[str, Tensor] = {}
        self.weights: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.windows: list[list[int]] = []
        self.codes: dict[int, list[Tensor]] = {}

    def install(self) -> None:
        place, clip = PretrainModule._enter_step, PretrainModule.configure_gradient_clipping
        recorder = self

        def placed(module: Any, step: int, batch: Any) -> None:
            if step == len(recorder.weights):
                recorder.begin(module, step)
            recorder.windows[step] += batch["window"].tolist()
            if step == recorder.last:
                recorder.watch_codes(module, int(batch["first_sample"]))
            place(module, step, batch)

        def clipped(module: Any, optimizer: Any, **kwargs: Any) -> None:
            grads = {n: whole(p.grad).clone() for n, p in module.model.named_parameters()}
            recorder.gradients.append(grads)
            clip(module, optimizer)

        PretrainModule._enter_step = placed  # type: ignore[method-assign]
        PretrainModule.configure_gradient_clipping = clipped  # type: ignore[method-assign]

    def kept(self) -> dict[str, Any]:
        names = ("initial", "weights", "gradients", "windows", "codes")
        return {name: getattr(self, name) for name in names}

    @torch.no_grad()
    def begin(self, module: Any, step: int) -> None:
        """Take the reference's weights, and note those the step starts from."""
        if step == 0:
            self.initial = {n: whole(p).clone() for n, p in module.model.named_parameters()}
        for name, parameter in module.model.named_parameters():
            if self.start is not None:
                copy_into(parameter, self.start[step][name])
            if self.perturb and step == 0:
                parameter.mul_(1 + self.perturb * torch.randn_like(parameter))
        weights = {n: whole(p).clone() for n, p in module.model.named_parameters()}
        self.weights.append(weights)
        self.windows.append([])

    def watch_codes(self, module: Any, first_sample: int) -> None:
        """Keep, in their order, what the layers' quantizers yield in this micro-batch."""
        kept, ranks = self.codes.setdefault(first_sample, []), module.trainer.world_size
        for layer in module.quantized_layers.values():
            layer.backend = Keeping(getattr(layer.backend, "inner", layer.backend), kept, ranks)


class Keeping:
    """A backend that keeps the operands that vary with the batch, as [tokens, features].

    Gradients as of the mean over all ranks: a rank's own are so many times larger.
    """

    name = "keeping"

    def __init__(self, inner: Any, kept: list[Tensor], ranks: int) -> None:
        self.inner, self.kept, self.ranks = inner, kept, ranks

    def operand(self, x: Tensor, format: Any, dim: int, key: Any) -> Any:
        result = self.inner.operand(x, format, dim, key)
        if format is not None and not isinstance(x, torch.nn.Parameter):
            self.kept.append(result.values)
        return result

    def operands(self, x: Tensor, across: Any, down: Any) -> Any:
        first, second = self.inner.operands(x, across, down)
        self.kept += [first.values / self.ranks, second.values / self.ranks]
        return first, second

    def matmul(self, *args: Any) -> Tensor:
        product: Tensor = self.inner.matmul(*args)
        return product


def whole(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def copy_into(parameter: Tensor, value: Tensor) -> None:
    if isinstance(parameter, DTensor):
        value = distribute_tensor(
            value, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    parameter.copy_(value)
