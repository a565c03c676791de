"""What layers may hold on to from one call to the next, and for how long that is right.

PyTorch gives no sign of a write through `.data` or numpy, so what outlives a call and belongs to no
graph is used only within `Reuse`, whose owner promises that there are none. Elsewhere every layer
makes its own.
"""

import weakref
from collections.abc import Callable, MutableMapping
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

Made = dict[Any, Any]  #: operands, or codes


@dataclass(frozen=True)
class Keep:
    """What a layer may hold on to beside what the unquantized one holds: time against memory.

    Neither changes a bit of the results but signs of zero.
    """

    quantized_weights: bool = False
    """Within `Reuse`, quantize a weight once for all micro-batches of a step, and hold its copies:
    for each GEMM that reads the weight one in the compute dtype. Not under FSDP2 nor
    torch.compile."""
    quantized_inputs: bool = False
    """Between forward and backward hold wgrad's input as codes of a byte and scales, instead of the
    input itself or the operand in BF16. Stochastically rounded ones are held for each layer."""


class Reuse:
    """`with Reuse():` around a forward pass: layers share what they make of one input, and keep
    what `Keep` says; with one object for all micro-batches of a step, for all of them.

    Whoever enters it promises that nobody writes to weights or to layers' inputs but in ways that
    autograd counts, or by an optimizer of torch.optim. Of this thread; a copy is empty.
    """

    def __init__(self) -> None:
        self._input: Callable[[], Tensor | None] = lambda: None
        self._state: Any = None
        self._made: Made = {}
        self._weights: MutableMapping[Any, tuple[Any, Made]] = weakref.WeakKeyDictionary()
        self._entered: list[Token[Reuse | None]] = []
        _forget_at_optimizer_steps(weakref.ref(self))

    def __enter__(self) -> "Reuse":
        self._entered.append(_current.set(self))
        return self

    def __exit__(self, *_: object) -> None:
        _current.reset(self._entered.pop())
        self._input, self._made = (lambda: None), {}

    def __reduce__(self) -> Any:
        return Reuse, ()

    def forget(self) -> None:
        """Let go of all operands of weights."""
        self._weights.clear()

    def of_input(self, input: Tensor, dtype: torch.dtype) -> Made | None:
        """What there is of `input` cast to `dtype`, for the caller to look up and to add to.

        None of what autograd has not computed: it may be a buffer that others fill.
        """
        if input.grad_fn is None:
            return None
        state = input._version, dtype
        if self._input() is not input or state != self._state:
            made: Made = {}
            self._made, self._state = made, state
            self._input = weakref.ref(input, lambda _: made.clear())
        return self._made

    def of_weight(self, owner: Any, weight: Tensor, *numerics: object) -> "KeptWeight":
        """The operands of a layer's weight, while it and the numerics are the same."""
        state = weight, weight.data_ptr(), weight._version, *numerics
        before, made = self._weights.get(owner, ((), {}))
        if len(before) != len(state) or before[0] is not weight or before[1:] != state[1:]:
            made = {}
            self._weights[owner] = state, made
        return KeptWeight(self, owner, made)


@dataclass(frozen=True)
class KeptWeight:
    """Operands of a layer's weight as a forward found them."""

    reuse: Reuse
    layer: Any
    made: Made

    def now(self) -> Made | None:
        """While the layer has that weight still: a checkpointed region is repeated with another."""
        (weight, place, version, *_), made = self.reuse._weights.get(
            self.layer, ((None, 0, 0), None)
        )
        now: Any = self.layer.weight
        where = now.data_ptr(), now._version
        same = weight is now and where == (place, version) and made is self.made
        return self.made if same else None


def _forget_at_optimizer_steps(reuse: "weakref.ref[Reuse]") -> None:
    """Fused optimizers count no version."""

    def forget(*_: object) -> None:
        if (living := reuse()) is not None:
            living.forget()

    handle = register_optimizer_step_post_hook(forget)
    weakref.finalize(reuse(), handle.remove)


_current: ContextVar[Reuse | None] = ContextVar("reuse", default=None)


def reused_now() -> Reuse | None:
    """What this thread has entered; compiled graphs and inference tensors are for nobody else."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return None
    return _current.get()
