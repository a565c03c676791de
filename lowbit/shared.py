"""What layers make of an input that several of them read one after the other: q, k and v, or gate
and up.
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Made = dict[Any, Any]  #: operands, or codes


class LatestInput(threading.local):
    """Of each thread, what was made of the input read last; forgotten when that dies."""

    def __init__(self) -> None:
        self._input: Callable[[], Tensor | None] = lambda: None
        self._state: Any = None
        self._made: Made = {}

    def made_of(self, input: Tensor, dtype: torch.dtype) -> Made:
        """What there is of `input` cast to `dtype`, for the caller to look up and to add to.

        None of what autograd has not computed: others may write to it and tell nobody.
        """
        if torch.compiler.is_compiling() or input.grad_fn is None:
            return {}
        state = input._version, dtype
        if self._input() is not input or state != self._state:
            self._made.clear()
            made: Made = {}
            self._made = made
            self._input = weakref.ref(input, lambda _: made.clear())
            self._state = state
        return self._made
