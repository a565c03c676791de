"""The Triton quantizer equals the PyTorch definition bit for bit, in Triton's interpreter.

No GPU is needed: the kernels are compiled for them, and read (compile_triton.py).
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lowbit
from lowbit import kernels
from lowbit.definition.scale import outer_scale
from lowbit.formats import (
    E4M3,
    NAMED,
    BlockFormat,
    IntFormat,
    OuterScale,
    Rounding,
    ScaleFormat,
    ScaleRule,
)
from lowbit.kernels.request import Request
from lowbit.quantize import quantize_values

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs them there")
FORMATS = [
    *(format for format in NAMED.values() if format.block_size != -1),
    *(replace(NAMED["mxint8"], scale_rule=rule) for rule in list(ScaleRule)[1:]),
    *(replace(NAMED["mxfp6"], scale_rule=rule) for rule in list(ScaleRule)[1:]),
    *(replace(NAMED[name], rounding=Rounding.STOCHASTIC) for name in ("mxint4", "mxfp8", "nvfp4")),
    *(replace(NAMED[name], rounding=Rounding.HALF_AWAY) for name in ("mxint6", "mxfp4")),
    *(BlockFormat("mxint8", IntFormat(2), scale_rule=rule) for rule in ScaleRule),
    BlockFormat("mxint8", IntFormat(8, symmetric=False), scale_rule=ScaleRule.FLOOR),
    BlockFormat("mxint8", IntFormat(8), ScaleFormat.BF16, scale_rule=None),
    BlockFormat("mxfp8", E4M3, ScaleFormat.FP32, scale_rule=None),
    replace(NAMED["nvfp4"], scale_min=2.0**-6),
    *(replace(NAMED[name], outer_scale=OuterScale.ROW) for name in ("nvfp4", "nvint8") * 2),
    replace(NAMED["mxint8"], block_size=(32, 16)),
    replace(NAMED["mxfp4"], block_size=1),
    replace(NAMED["mxfp8"], block_size=64),
    replace(NAMED["mxint8"], block_size=1024),
]


@pytest.fixture(scope="module")
def gpu() -> Any:
    """The operators for CUDA; on CPU tensors, since tests/conftest.py chose the interpreter."""
    from lowbit.kernels.gpu import calls as gpu

    return gpu


@pytest.fixture(autouse=True)
def quiet_numpy() -> Iterator[None]:
    """What overflows saturates afterwards."""
    with np.errstate(all="ignore"):
        yield


def _awkward(dtype: torch.dtype, most: float = 1.0) -> Tensor:
    """[37, 70]: all sizes, zeros, subnormals, the largest number, NaN and infinity; maxima of
    blocks in both directions that are 8 x `most`, and the FP32 numbers beside it.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, 70, generator=generator)
    x *= torch.exp2(torch.randint(-30, 30, (37, 1), generator=generator))
    x[3], x[4], x[5] = -0.0, 3.39e38, x[5] * 2.0**-140
    x[32:] = 0.1
    edge = torch.tensor(8.0 * most)
    x[34] = edge.nextafter(edge * 2)
    x[34, :16], x[34, 16:32] = edge.nextafter(edge / 2), edge
    x[10, 5], x[33, 40] = float("nan"), -float("inf")
    return x.to(dtype)


def _wanted(x: Tensor, format: BlockFormat, number: int = 0, saturates: bool = False) -> Request:
    stochastic = format.rounding is Rounding.STOCHASTIC
    key = lowbit.Key.of(number).at(2**33 + 7) if stochastic else None
    return Request(
        format, key, x.dtype if saturates or format.fits_bf16 else torch.float32, saturates
    )


def _above(gpu: Any, x: Tensor, format: BlockFormat, dim: int) -> Tensor | None:
    if format.outer is not OuterScale.TENSOR:
        return outer_scale(x, format, dim)
    return gpu.tensor_scale(x, E4M3.max * format.element.max)


@pytest.mark.parametrize(("index", "format"), [*enumerate(FORMATS)], ids=str)
def test_fake_quantize(
    gpu: Any, same_bits: Callable[..., bool], index: int, format: BlockFormat
) -> None:
    dtype, dim = (torch.float32, torch.bfloat16)[index % 2], index // 2 % 2
    x = _awkward(dtype, format.element.max)
    wanted = _wanted(x, format, saturates=True)
    asked = x, wanted.description, dim, dtype, wanted.limit
    if format.outer is OuterScale.ROW:
        rows = outer_scale(x, format, dim)
        asked = x, wanted.description, dim, torch.float32, torch.inf
        found = gpu.quantize_rows(*asked, rows, *wanted.noise) * rows
        found = found.clamp_(-wanted.limit, wanted.limit).to(dtype)
    elif format.outer is OuterScale.TENSOR:
        found = gpu.quantize_scaled(*asked, True, *wanted.noise)[0]
    else:
        found = gpu.quantize(*asked, *wanted.noise)
    with kernels.using("off"):
        assert same_bits(found, lowbit.fake_quantize(x, format, dim, key=wanted.key))


@pytest.mark.parametrize("shape", [(1, 33), (33, 1)])
@pytest.mark.parametrize("dim", [0, 1])
def test_an_axis_of_one_value(
    gpu: Any, same_bits: Callable[..., bool], shape: tuple[int, int], dim: int
) -> None:
    x, wanted = torch.randn(shape), Request(NAMED["mxfp4"], None, torch.float32)
    found = gpu.quantize(x, wanted.description, dim, x.dtype, wanted.limit, *wanted.noise)
    with kernels.using("off"):
        assert same_bits(found, quantize_values(x, NAMED["mxfp4"], dim)[0])


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_batch_of_matrices_where_it_lies(
    gpu: Any, same_bits: Callable[..., bool], dim: int
) -> None:
    x = torch.randn(2, 34, 5).transpose(0, 2)
    format = replace(NAMED["mxfp6"], rounding=Rounding.STOCHASTIC if dim == 1 else Rounding.NEAREST)
    wanted = _wanted(x, format)
    found = gpu.quantize(x, wanted.description, dim, x.dtype, wanted.limit, *wanted.noise)
    with kernels.using("off"):
        assert same_bits(found, quantize_values(x, format, dim, key=wanted.key)[0])
    assert dim == 1 or found.stride() == x.stride()


@pytest.mark.parametrize(
    ("across", "down"),
    [
        *(("mxint8", "mxint8"), ("nvfp4", "mxfp8"), ("mxfp4", "nvint8")),
        *(("stochastic", "stochastic"), ("rows", "rows"), ("rows", "nvint8")),
    ],
)
def test_both_axes_in_one_read(
    gpu: Any, same_bits: Callable[..., bool], across: str, down: str
) -> None:
    x = _awkward(torch.bfloat16)
    known = NAMED | {"stochastic": replace(NAMED["mxfp4"], rounding=Rounding.STOCHASTIC)}
    known["rows"] = replace(NAMED["nvint4"], outer_scale=OuterScale.ROW)
    wanted = [_wanted(x, known[name], i) for i, name in enumerate((across, down))]
    above = [_above(gpu, x, w.format, 1 - i) for i, w in enumerate(wanted)]
    found = gpu.quantize_both(
        *(x, wanted[0].description + wanted[1].description, [w.dtype for w in wanted]),
        *([w.limit for w in wanted], above),
        [*wanted[0].noise, *wanted[1].noise],
    )
    with kernels.using("off"):
        for dim, ours, want in zip((1, 0), (found[0], found[1].t()), wanted, strict=True):
            assert same_bits(ours, lowbit.Emulate().operand(x, want.format, dim, want.key).values)


@pytest.mark.slow
def test_compiles_for_three_architectures(tmp_path: Path) -> None:
    script = Path(__file__).with_name("compile_triton.py")
    changes = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run(
        [sys.executable, script, "80", "90", "100"], env=os.environ | changes, check=True
    )
