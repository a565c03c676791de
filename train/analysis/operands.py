"""The six operands of every linear layer, of one forward and backward pass, under many formats."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit import BlockFormat, Rotation, crest_factor, rotate
from lowbit.stats import quantization_error
from train.microscope.layers import chosen_linears, place_of
from train.subjects.text import Text

CREST_BLOCKS = (-1, 32, 16)
"""Block sizes of the study's crest factor table."""


@dataclass(frozen=True)
class Look:
    """What to look at each operand with."""

    formats: tuple[BlockFormat, ...]
    rotations: tuple[str, ...] = ("none",)  #: `none`, `block` (of the format), or a size


@dataclass
class Findings:
    """Plain rows, one a tensor and format, and one a tensor and block size."""

    qsnr: list[dict[str, Any]] = field(default_factory=list)
    crest: list[dict[str, Any]] = field(default_factory=list)
    loss: float = 0.0


def look_at(x: Tensor, dim: int, look: Look) -> Findings:
    """The matrix `x` in blocks along `dim`; rows without a layer's name."""
    found = Findings()
    turned: dict[int, Tensor] = {0: x.detach()}
    crests: dict[tuple[int, int], float] = {}

    def through(rotation: str, block: int) -> tuple[Tensor, float]:
        """The rotated matrix, and the mean of its crest factors."""
        size = hadamard_size(rotation, block)
        if size not in turned:
            turned[size] = rotate(turned[0], Rotation(size), dim)
        if (size, block) not in crests:
            crests[size, block] = float(crest_factor(turned[size], block, dim).nanmean())
        return turned[size], crests[size, block]

    for rotation in look.rotations:
        for format in look.formats:
            assert isinstance(format.block_size, int)
            tensor, crest = through(rotation, format.block_size)
            error = quantization_error(tensor, format, dim)
            found.qsnr.append(
                {
                    "rotation": rotation, "format": str(format), "qsnr_db": error.qsnr_db,
                    "crest": crest, "underflow": error.underflow_share,
                }
            )  # fmt: skip
        for block in CREST_BLOCKS:
            crest = through(rotation, block)[1]
            found.crest.append({"rotation": rotation, "block": block, "crest": crest})
    return found


def hadamard_size(rotation: str, block: int) -> int:
    """0 for none; `block` is that of the format, and 32 for whole rows, as in the study."""
    if rotation == "block":
        return block if block > 0 else 32
    return 0 if rotation == "none" else int(rotation)


class Observer:
    """Hooks on the linear layers of a model; what flows through them is measured at once."""

    def __init__(self, model: nn.Module, look: Look, patterns: Sequence[str]) -> None:
        self.look, self.findings = look, Findings()
        self._last: tuple[Tensor | None, dict[str, Any]] = (None, {})
        self._handles: list[Any] = []
        self.layers = chosen_linears(model, patterns)
        for name, layer in self.layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._on_input(name)))
            self._handles.append(layer.register_forward_hook(self._on_output(name)))

    def look_at_weights(self) -> None:
        """Both operands that are made of each weight."""
        for name, layer in self.layers.items():
            self._record(name, "fprop_weight", self._look(layer.weight, 1))
            self._record(name, "dgrad_weight", self._look(layer.weight, 0))

    def remove(self) -> None:
        """Leave the layers as they were."""
        for handle in self._handles:
            handle.remove()

    def _on_input(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            x = inputs[0]
            if self._last[0] is not x:  # q, k and v read the same tensor: look once
                matrix = x.reshape(-1, x.shape[-1])
                both = {"fprop_input": 1, "wgrad_input": 0}
                self._last = x, {o: self._look(matrix, dim) for o, dim in both.items()}
            for operand, found in self._last[1].items():
                self._record(name, operand, found)

        return hook

    def _on_output(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def on_gradient(gradient: Tensor) -> None:
            matrix = gradient.reshape(-1, gradient.shape[-1])
            self._record(name, "dgrad_grad_output", self._look(matrix, 1))
            self._record(name, "wgrad_grad_output", self._look(matrix, 0))

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            # on the tensor: a module's backward hook bars a model from adding to it in place
            output.register_hook(on_gradient)  # type: ignore[no-untyped-call]  # torch's

        return hook

    def _look(self, x: Tensor, dim: int) -> Any:
        return look_at(x, dim, self.look)

    def _record(self, name: str, operand: str, found: Any) -> None:
        where = place_of(name) | {"operand": operand}
        self.findings.qsnr += [where | row for row in found.qsnr]
        self.findings.crest += [where | row for row in found.crest]


def observe(model: nn.Module, text: Text, look: Look, patterns: Sequence[str]) -> Findings:
    """One forward and backward pass over all windows; the loss is the mean over their tokens."""
    observer = Observer(model, look, patterns)
    try:
        observer.findings.loss = backward_pass(model, text)
    finally:
        observer.remove()
    observer.look_at_weights()
    return observer.findings


def backward_pass(model: nn.Module, text: Text) -> float:
    """Forward and backward over all windows, for hooks to see; the mean loss, nats per token."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model.to(device).train(False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    embeddings.weight.requires_grad_(True)  # enough for gradients to flow through every layer
    logits = model(input_ids=text.inputs.to(device), use_cache=False).logits
    loss = F.cross_entropy(logits.float().flatten(0, 1), text.labels.to(device).flatten())
    if not bool(loss.isfinite()):
        raise ValueError(f"the model's loss on {text.source} is {float(loss)}: nothing to look at")
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())
