"""What activation checkpointing computes again is computed as it was, whatever is set by then.

`torch.utils.checkpoint` of both kinds gives back the autocast state and torch's random numbers, but
knows nothing of recipes and `Randomness`. So what a layer computes with is written down beside the
region that is checkpointed, and looked up there when that is computed again. Where the regions lie
is read off the stack: PyTorch has no other sign of them. Compiled graphs do it by an operator that
gives them back their random numbers and refuses another recipe.
"""

import inspect
import sys
from collections import defaultdict
from dataclasses import replace
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint as checkpointing
from torch import Tensor, nn

from lowbit.definition.noise import Key
from lowbit.operands import LayerNumerics

_FORWARD = inspect.unwrap(checkpointing.checkpoint).__code__
_REENTRANT = checkpointing.CheckpointFunction.forward.__code__
_REENTRANT_AGAIN = checkpointing.CheckpointFunction.backward.__code__
_AGAIN = "unpack_hook", checkpointing.__file__


class Region(NamedTuple):
    """A part of the model whose activations are computed again in the backward pass."""

    notes: dict[Any, list[Any]]  #: of each layer, call by call
    calls: dict[Any, int] | None  #: of each layer in this repetition; None the first time


def as_at_first(layer: nn.Module, numerics: LayerNumerics, changes: bool) -> LayerNumerics:
    """`numerics`, or those of the forward that is being repeated.

    `changes`: whether they ever differ; RuntimeError for such a layer in a backward pass that does
    not say what it repeats.
    """
    in_backward = torch._C._current_graph_task_id() != -1
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    if torch.is_grad_enabled() and not hooked and not in_backward:
        return numerics  # no region is open
    regions = _regions()
    repeated = [region for region in regions if region.calls is not None]
    if repeated:
        numerics = _next_note(repeated[0], layer)
    elif in_backward and changes:
        raise RuntimeError(
            "a quantized layer ran inside a backward pass, but not for torch.utils.checkpoint: "
            "which recipe and random numbers it repeats is unknown; use torch.utils.checkpoint"
        )
    for region in regions:
        if region.calls is None:
            region.notes.setdefault(layer, []).append(numerics)
    return numerics


@torch.library.custom_op("lowbit::as_at_first", mutates_args=(), tags=[torch.Tag.cudagraph_unsafe])
def _as_at_first(numbers: Tensor, layer: int, recipe: str) -> Tensor:
    """`numbers`, or those of the forward that a compiled graph repeats under the same recipe."""
    regions = _regions()
    repeated = [region for region in regions if region.calls is not None]
    note = _next_note(repeated[0], layer) if repeated else (numbers.clone(), recipe)
    if note[1] != recipe:
        raise RuntimeError(
            "a compiled layer's recipe has changed between forward and backward of a checkpointed "
            "region: call backward before set_recipe, or do not compile the layer"
        )
    for region in regions:
        if region.calls is None:
            region.notes.setdefault(layer, []).append(note)
    numbers = note[0]
    return numbers.clone()


@_as_at_first.register_fake
def _(numbers: Tensor, layer: int, recipe: str) -> Tensor:
    return torch.empty_like(numbers)


def as_at_first_in_graph(
    layer: Any, numerics: LayerNumerics, input: Tensor
) -> tuple[LayerNumerics, Tensor]:
    """The same for a layer that is being compiled, and its input, on which a graph whose recipe has
    ever changed depends by a factor of one.
    """
    if (key := numerics.key) is not None:
        numbers = torch.stack((key.state, key.first_row))
        found = torch.ops.lowbit.as_at_first(numbers, layer.index, layer.told)
        return replace(numerics, key=Key(found[0], found[1])), input
    if layer.changes and input.is_floating_point():
        one = torch.ops.lowbit.as_at_first(input.new_ones(()), layer.index, layer.told)
        return numerics, input * one
    return numerics, input


def _next_note(region: Region, layer: Any) -> Any:
    assert region.calls is not None
    call, notes = region.calls[layer], region.notes.get(layer, [])
    region.calls[layer] += 1
    if call >= len(notes):
        raise RuntimeError(
            "a checkpointed region calls a quantized layer more often than in its forward, or its "
            "compiled layers changed their recipe since: call backward before set_recipe"
        )
    return notes[call]


def _regions() -> list[Region]:
    """Those that this thread is computing, outermost first."""
    found: list[Region] = []
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code is _FORWARD:
            if (pieces := frame.f_locals.get("gen")) is not None:
                found.append(_of(pieces.gi_frame.f_locals["new_frame"]))
        elif code is _REENTRANT:
            found.append(_of(frame.f_locals["ctx"]))
        elif code is _REENTRANT_AGAIN:
            found.append(_of(frame.f_locals["ctx"], torch._C._current_graph_task_id()))
        elif (code.co_name, code.co_filename) == _AGAIN and "frame" in frame.f_locals:
            found.append(_of(frame.f_locals["frame"], frame.f_locals["gid"]))
        frame = frame.f_back
    return found[::-1]


def _of(holder: Any, repetition: object = None) -> Region:
    """The region that an object of torch's stands for, which keeps what is noted of it."""
    notes, calls = vars(holder).setdefault("_lowbit", ({}, {}))
    if repetition is None:
        return Region(notes, None)
    return Region(notes, calls.setdefault(repetition, defaultdict(int)))
