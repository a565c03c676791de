"""Activations on their way through the blocks, and the Hessians of what layers read there."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import BlockFormat, Transform, fake_quantize, transformed
from train.ptq.skeleton import Skeleton, run

Group = tuple[str, ...]  #: layers that read one input


@dataclass
class Moments:
    """Of the inputs X [tokens, in] of a group, and of what they are moved by from the original."""

    hessian: Tensor  #: XᵀX, FP64
    cross: Tensor | None  #: (X₀ - X)ᵀX, FP64, X₀ of the original model
    amax: float  #: largest magnitude of X


@dataclass
class Streams:
    """Hidden states [windows, tokens, width] in front of a block; `quantized` only where needed."""

    original: Tensor
    quantized: Tensor | None
    others: list[dict[str, Any]]  #: keyword arguments of each block

    @classmethod
    def begin(cls, skeleton: Skeleton, windows: Tensor, *, both: bool) -> "Streams":
        """Of the token ids [windows, tokens]."""
        with skeleton.embedding():
            calls = [skeleton.calls(ids[None]) for ids in windows]
        hidden = torch.cat([call.hidden for call in calls])
        return cls(hidden, hidden.clone() if both else None, calls[0].others)


def advance(hidden: Tensor, block: nn.Module, others: dict[str, Any]) -> Tensor:
    """Hidden states [windows, tokens, width] behind the block, a window at a time."""
    return torch.cat([run(block, hidden[i : i + 1], others) for i in range(len(hidden))])


@dataclass(frozen=True)
class Inputs:
    """How the inputs of a Hessian come about."""

    transform: Transform | None
    activations: BlockFormat | None  #: that quantizes them, where the Hessian is of quantized ones

    def seen(self, x: Tensor, quantize: bool = True) -> Tensor:
        """`x` as it enters the product."""
        x = transformed(x, self.transform) if self.transform else x.float()
        return fake_quantize(x, self.activations) if self.activations and quantize else x

    def unturned(self, x: Tensor) -> Tensor:
        """What a layer without transform has to read for the product to be that of `x`."""
        if self.transform is None:
            return x
        inverse = self.transform.inverse_transpose(x.device).T
        return (x.reshape(*x.shape[:-1], -1, len(inverse)) @ inverse).reshape(x.shape)


def moments(
    block: nn.Module, groups: Sequence[Group], streams: Streams, index: int, inputs: Inputs,
    *, cross: bool,
) -> dict[Group, Moments]:  # fmt: skip
    """Those of every group of a block, in one pass over the windows. Where that pass is one of the
    original stream, it is behind the block after.
    """
    found: dict[Group, Moments] = {}
    behind, others = [], streams.others[index]
    for i in range(len(streams.original)):
        targets: dict[Group, Tensor] = {}
        original = streams.original[i : i + 1]
        if cross:

            def keep(group: Group, x: Tensor, targets: dict[Group, Tensor] = targets) -> None:
                targets[group] = x

            with _reading(block, groups, keep):
                behind.append(run(block, original, others))

        def add(group: Group, x: Tensor, targets: dict[Group, Tensor] = targets) -> Tensor | None:
            seen = inputs.seen(x)
            matrix = seen.reshape(-1, seen.shape[-1])
            moved = None
            if group in targets:
                moved = inputs.seen(targets[group], quantize=False).reshape(matrix.shape) - matrix
            _accumulate(found, group, matrix, moved)
            return inputs.unturned(seen) if inputs.activations else None

        source = original if streams.quantized is None else streams.quantized[i : i + 1]
        with _reading(block, groups, add):
            out = run(block, source, others)
        if streams.quantized is None:
            behind.append(out)
    streams.original = torch.cat(behind) if behind else advance(streams.original, block, others)
    return found


def _accumulate(found: dict[Group, Moments], group: Group, x: Tensor, moved: Tensor | None) -> None:
    hessian, amax = (x.T @ x).double(), float(x.abs().max())
    cross = None if moved is None else (moved.T @ x).double()
    if group in found:
        known = found[group]
        hessian += known.hessian
        cross = cross if known.cross is None or cross is None else cross + known.cross
        amax = max(amax, known.amax)
    found[group] = Moments(hessian, cross, amax)


@contextmanager
def _reading(
    block: nn.Module, groups: Sequence[Group], read: Callable[[Group, Tensor], Tensor | None]
) -> Iterator[None]:
    """Show `read` what each group reads, once; what it returns is what the group's layers get."""
    handles, replaced = [], dict[Group, Tensor]()

    def hook_of(group: Group, is_first: bool) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Tensor]) -> Any:
            if is_first:
                replaced.pop(group, None)
                if (new := read(group, args[0])) is not None:
                    replaced[group] = new
            return (replaced[group],) if group in replaced else None

        return hook

    modules = {m: name for name, m in block.named_modules()}
    for module, name in modules.items():
        for group in groups:
            within = [n for n in group if n.endswith(f".{name}") and name]
            if within and isinstance(module, nn.Linear):
                handles.append(
                    module.register_forward_pre_hook(hook_of(group, within[0] == group[0]))
                )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
