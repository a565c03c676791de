"""What stands in for the definition where it can be faster: bit-equal to it.

The environment variable LOWBIT_KERNELS chooses: `auto` (default) uses the kernels where they can be
built and says in one line where they cannot, `require` raises there, `off` keeps to the definition.
C++ for CPUs, Triton for CUDA devices.
"""

import importlib
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lowbit.definition.noise import Key
from lowbit.formats import Arithmetic, BlockFormat, OuterScale, Rounding, ScaleFormat, ScaleRounding
from lowbit.kernels.cpu import measure
from lowbit.kernels.cpu.build import BuildError
from lowbit.kernels.cpu.calls import TRANSPOSING_PAYS
from lowbit.kernels.cpu.library import library
from lowbit.kernels.request import Request, quantize, quantize_both
from lowbit.kernels.request import codes as _codes

_MODES = ("off", "auto", "require")
_mode: str | None = None  # of `using`; else the environment's
_available: dict[str, bool] = {}  # by type of device


@contextmanager
def using(mode: str) -> Iterator[None]:
    """Choose `off`, `auto` or `require` for a while."""
    global _mode
    before, _mode = _mode, _checked(mode)
    try:
        yield
    finally:
        _mode = before


def mode() -> str:
    """`off`, `auto` or `require`."""
    return _mode or _chosen()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch's
def enabled(device: str = "cpu") -> bool:
    """Whether the kernels of this type of device are wanted and can run; loads them at first."""
    chosen = mode()
    if chosen == "off" or device not in ("cpu", "cuda"):
        return False
    if device not in _available or (chosen == "require" and not _available[device]):
        try:
            _load(device)
            _available[device] = True
        except (BuildError, ImportError) as error:
            if chosen == "require":
                raise
            _available[device] = False
            logging.getLogger("lowbit").warning("kernels off, PyTorch instead: %s", error)
    return _available[device]


@lru_cache
def _chosen() -> str:
    """By the environment, which is looked at once."""
    return _checked(os.environ.get("LOWBIT_KERNELS", "auto"))


def _load(device: str) -> None:
    if device == "cpu":
        library()
    else:
        importlib.import_module("lowbit.kernels.gpu.calls")  # needs Triton


Values = tuple[Tensor, Tensor | None]  # and the outer scale of NV formats


def quantize_values(x: Tensor, format: BlockFormat, dim: int, key: Key | None) -> Values | None:
    """`lowbit.quantize.quantize_values`, or None where no kernel does it."""
    if not _covers(x, format, dim):
        return None
    exact = format.scale == ScaleFormat.E8M0 and format.rounding is Rounding.NEAREST
    dtype = x.dtype if exact and format.fits_bf16 else torch.float32
    return quantize(x, dim, Request(format, key, dtype))


def fake_quantize(x: Tensor, format: BlockFormat, dim: int, key: Key | None) -> Tensor | None:
    """`lowbit.quantize.fake_quantize` in one pass, or None where no kernel does it: those of rows'
    scales leave them to be multiplied in.
    """
    if not _covers(x, format, dim) or format.outer is OuterScale.ROW:
        return None
    return quantize(x, dim, Request(format, key, x.dtype, saturates=True), apply=True)[0]


def operand(x: Tensor, format: BlockFormat, dim: int, key: Key | None) -> Values | None:
    """What `Emulate.operand` holds, without a copy of `x` in FP32; None where no kernel does it."""
    return quantize(x, dim, _request(x, format, key)) if _covers(x, format, dim) else None


def operands(
    x: Tensor, across: tuple[BlockFormat, Key | None], down: tuple[BlockFormat, Key | None]
) -> tuple[Values, Values] | None:
    """`operand` of the matrix `x` along its rows and along its columns, in one read of it.

    The second is for a product with its transpose, and lies so. None too where two reads of what
    lies in the cache cost less than transposing saves.
    """
    if x.device.type == "cpu" and not TRANSPOSING_PAYS:
        return None
    for dim, (format, _) in ((1, across), (0, down)):
        size = format.block_size
        if not isinstance(size, int) or not 1 <= size <= 64 or not _covers(x, format, dim):
            return None
    return quantize_both(x, _request(x, *across), _request(x, *down))


def codes(
    x: Tensor, format: BlockFormat, dim: int, key: Key | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """INT8 codes [rows, K] of a matrix in integer blocks along `dim`, whose length is K.

    FP32 scales [rows, blocks] beside them, and the outer scale of NV formats.
    """
    return _codes(x, dim, format, key)


def quantization_sums(
    x: Tensor, wanted: Sequence[tuple[BlockFormat, Key | None]], dim: int
) -> list[measure.Sums] | None:
    """`lowbit.stats.quantization_errors`' sums, or None where no kernel does them.

    In one read for all formats of a block size.
    """
    if x.device.type != "cpu" or not x.dim():
        return None
    if not all(_covers(x, f, dim) and f.outer is not OuterScale.ROW for f, _ in wanted):
        return None
    together: dict[Any, list[Request]] = {}  # random numbers depend on places, so they go apart
    kinds = [(format.block_size, key is None) for format, key in wanted]
    for kind, (format, key) in zip(kinds, wanted, strict=True):
        request = Request(format, key, torch.float32, saturates=True)
        together.setdefault(kind, []).append(request)
    found = {kind: iter(measure.quantization_sums(x, dim, together[kind])) for kind in together}
    return [next(found[kind]) for kind in kinds]


def crest_factors(x: Tensor, block_size: int, dim: int) -> Tensor | None:
    """`lowbit.stats.crest_factor` in one read, or None where no kernel does it."""
    if x.device.type != "cpu" or not _reads(x, dim) or not x.dim():
        return None
    return measure.crest_factors(x, block_size, dim)


def _request(x: Tensor, format: BlockFormat, key: Key | None) -> Request:
    return Request(format, key, x.dtype if format.fits_bf16 else torch.float32)


def takes(format: BlockFormat) -> bool:
    """Whether kernels know it; the rules that search for a scale are left to the definition."""
    searches = format.scale_rule in (ScaleRounding.BEST, ScaleRounding.FOUR_OVER_SIX)
    return format.arithmetic is Arithmetic.FP32 and not searches


def _covers(x: Tensor, format: BlockFormat, dim: int) -> bool:
    return (
        takes(format)
        and (isinstance(format.block_size, int) or x.ndim >= 2)
        and (x.device.type == "cpu" or _powers_of_two(format.block_size))
        and _reads(x, dim)
    )


def _reads(x: Tensor, dim: int) -> bool:
    return (
        x.dtype in (torch.float32, torch.bfloat16)
        and x.numel() > 0
        and type(x) in (Tensor, torch.nn.Parameter)
        and -x.ndim <= dim < max(x.ndim, 1)
        and enabled(x.device.type)
    )


def _powers_of_two(block_size: int | tuple[int, int]) -> bool:
    """Triton's shapes are; beyond 2^14 values a block does not fit its registers."""
    sizes = block_size if isinstance(block_size, tuple) else (block_size,)
    return all(size > 0 and size.bit_count() == 1 for size in sizes) and math.prod(sizes) <= 2**14


def _checked(mode: str) -> str:
    if mode not in _MODES:
        raise ValueError(f"LOWBIT_KERNELS={mode!r}, expected one of {_MODES}")
    return mode
