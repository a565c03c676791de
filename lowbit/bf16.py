"""How BF16 matrices are multiplied here: the one place that decides.

`native`: by the device's own BF16 GEMM. `fp32`: as the FP32 product of the same operands, rounded
once to BF16. A product of two BF16 numbers is exact in FP32, so that this is what a BF16 unit with
FP32 sums computes, up to their order; for a CPU without such a unit PyTorch has nothing but a slow
loop. The environment variable LOWBIT_BF16 chooses: `auto` (default) is `native` where the CPU has
AVX512-BF16 or AMX-BF16, on Arm where oneDNN finds a unit, else `fp32`.

Products of quantized operands ask here. All others of a process, those of unquantized layers and of
attention, are PyTorch's own, and follow within `everywhere`, which the command line enters.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

Products = Literal["native", "fp32"]
VARIABLE = "LOWBIT_BF16"
_CHOICES = ("auto", "native", "fp32")
_choice: str | None = None  # of `using`; else the environment's
_of_forward: ContextVar[Products | None] = ContextVar("products of a forward", default=None)
_stands = False  # whether `everywhere` is entered and has its kernels in place


def products(device: str = "cpu") -> Products:
    """How BF16 matrices on this type of device are multiplied.

    ValueError for a typo, and for `fp32` on a device that needs no such help.
    """
    if device == "cpu" and not torch.compiler.is_compiling() and (captured := _of_forward.get()):
        return captured
    way: Products = _decided(_choice, device)  # of a global: a compiled graph is one way's
    return way


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch's
def _decided(choice: str | None, device: str) -> Products:
    choice = choice or _chosen()
    if device == "cpu":
        return "native" if choice == "native" or (choice == "auto" and has_unit()) else "fp32"
    if choice == "fp32" and device != "meta":
        raise ValueError(f"{VARIABLE}=fp32 is for CPUs: the device {device} multiplies BF16 itself")
    return "native"


@contextmanager
def using(choice: str) -> Iterator[None]:
    """Choose `auto`, `native` or `fp32` for a while."""
    global _choice
    before, _choice = _choice, _checked(choice)
    try:
        yield
    finally:
        _choice = before


@contextmanager
def as_captured(way: Products) -> Iterator[None]:
    """In this thread CPUs multiply as was found at a forward, whatever is chosen by now."""
    token = _of_forward.set(way)
    try:
        yield
    finally:
        _of_forward.reset(token)


@lru_cache
def has_unit() -> bool:
    """Whether this CPU multiplies BF16 numbers itself, and PyTorch was built to use that."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # torch's
        return False
    # oneDNN's own answer is yes for every AVX-512, where it converts operands as we do
    found = torch.cpu.get_capabilities()
    known = found["avx512_bf16"] or found["amx_bf16"] if "avx512_bf16" in found else True
    return bool(known and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@lru_cache
def _chosen() -> str:
    """By the environment, which is looked at once."""
    return _checked(os.environ.get(VARIABLE, "auto"))


def _checked(choice: str) -> str:
    if choice not in _CHOICES:
        raise ValueError(f"{VARIABLE}={choice!r}, expected one of {_CHOICES}")
    return choice


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [M, K] @ b [K, N] + bias [N], all of one dtype."""
    if a.dtype is torch.bfloat16 and products(a.device.type) == "fp32":
        wide = None if bias is None else bias.float()
        return torch_matmul(a.float(), b.float(), wide).bfloat16()
    return torch_matmul(a, b, bias)


def torch_matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same by the calls that `nn.Linear` makes, which follow `everywhere` alone."""
    return a @ b if bias is None else torch.addmm(bias, a, b)


# --- every product of the process -----------------------------------------------------------------

_OPERATORS = ("mm", "addmm", "bmm", "baddbmm", "addmv", "dot")  # all that matmul and linear end in
_WITH_OUT = ("mm", "addmm", "bmm", "baddbmm", "addmv")  # which compiled graphs call
_IN_PLACE = ("addmm", "baddbmm", "addmv")
_ATTENTION = {  # how many arguments and results are BF16
    "_scaled_dot_product_flash_attention_for_cpu": (3, 1),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (5, 3),
}


@contextmanager
def everywhere() -> Iterator[None]:
    """Within, every product of BF16 matrices on CPUs is as `products` says, whoever asks for it.

    Under `fp32` kernels for PyTorch's operators stand before PyTorch's own, for compiled graphs
    too; what is not BF16 passes on to those. Under `native` nothing is done.
    """
    global _stands
    if _stands or products() == "native":
        yield
        return
    with torch.library._scoped_library("aten", "IMPL") as library:
        with warnings.catch_warnings():  # PyTorch says once that they come before others: they do
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            for name, kernel in _kernels().items():
                library.impl(name, kernel, "CPU", with_keyset=True)
        _stands = True
        try:
            yield
        finally:
            _stands = False


def _kernels() -> dict[str, Callable[..., Any]]:
    """By operator; each gets the dispatcher's keys before the operator's arguments."""
    kernels: dict[str, Any] = {name: _once_rounded(name) for name in _OPERATORS}
    kernels |= {f"{name}.out": _into(f"{name}.out", kernels[name]) for name in _WITH_OUT}
    kernels |= {f"{name}_": _into(f"{name}_", kernels[name]) for name in _IN_PLACE}
    for name, narrow in _ATTENTION.items():
        kernels[name] = _attention(name, *narrow)
    return kernels


def _apply(*operands: Tensor) -> bool:
    """Whether these are a product for us; operands of several dtypes are PyTorch's to refuse."""
    return all(x.dtype is torch.bfloat16 for x in operands) and products() == "fp32"


def _torchs(name: str) -> Callable[..., Any]:
    """The kernel that stands there now."""
    call: Callable[..., Any] = torch.library.get_kernel(f"aten::{name}", "CPU").call_boxed
    return call


def _once_rounded(name: str) -> Callable[..., Tensor]:
    call = _torchs(name)

    def kernel(keys: Any, *operands: Tensor, **factors: Any) -> Tensor:
        if not _apply(*operands):
            result: Tensor = call(keys, *operands, **factors)
            return result
        return call(keys, *(x.float() for x in operands), **factors).bfloat16()  # type: ignore[no-any-return]

    return kernel


def _into(name: str, product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The variant of a product that writes to `out`, or to its first operand."""
    call = _torchs(name)

    def kernel(keys: Any, *operands: Tensor, out: Tensor | None = None, **factors: Any) -> Tensor:
        target = operands[0] if out is None else out
        if not _apply(*operands, target):
            into = {} if out is None else {"out": out}
            result: Tensor = call(keys, *operands, **factors, **into)
            return result
        found = product(keys, *operands, **factors)
        return target.resize_(found.shape).copy_(found) if out is not None else target.copy_(found)

    return kernel


def _attention(name: str, operands: int, results: int) -> Callable[..., tuple[Tensor, ...]]:
    """So many of its first arguments and results are BF16; what follows is not (logsumexp)."""
    call = _torchs(name)

    def kernel(
        keys: Any, *arguments: Any, attn_mask: Tensor | None = None, **scale: Any
    ) -> tuple[Tensor, ...]:
        narrow, rest = arguments[:operands], arguments[operands:]
        if not _apply(*narrow):
            return tuple(call(keys, *arguments, attn_mask=attn_mask, **scale))
        wide = (x.float() for x in narrow)
        found = call(keys, *wide, *rest, attn_mask=_wide(attn_mask), **scale)
        return (*(x.bfloat16() for x in found[:results]), *found[results:])

    return kernel


def _wide(mask: Tensor | None) -> Tensor | None:
    """A mask of BF16 in FP32; one of booleans as it is."""
    return mask.float() if mask is not None and mask.dtype is torch.bfloat16 else mask
