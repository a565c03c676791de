"""The C++ quantizer equals the PyTorch definition bit for bit."""

import os
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import lowbit
from lowbit import kernels
from lowbit.formats import (
    E4M3,
    NAMED,
    BlockFormat,
    IntFormat,
    Rounding,
    ScaleFormat,
    ScaleRule,
)
from lowbit.quantize import quantize_values

pytestmark = pytest.mark.skipif(not kernels.enabled(), reason="no C++ compiler")
BLOCK_SIZES = (1, 3, 16, 32, 64, 128, 256, -1, (32, 32), (8, 3))


def _formats() -> Iterator[BlockFormat]:
    for format in NAMED.values():
        yield format
        yield from (replace(format, rounding=rounding) for rounding in list(Rounding)[1:])
        if format.scale is ScaleFormat.E8M0:
            yield from (replace(format, scale_rule=rule) for rule in list(ScaleRule)[1:])
    for element in (IntFormat(2), IntFormat(3), IntFormat(8, symmetric=False)):
        yield from (BlockFormat("mxint8", element, scale_rule=rule) for rule in ScaleRule)
    for scale in (ScaleFormat.BF16, ScaleFormat.FP32):
        yield BlockFormat("mxint8", IntFormat(8), scale, scale_rule=None)
        yield BlockFormat("mxfp8", E4M3, scale, scale_rule=None)
    yield replace(NAMED["nvfp4"], scale_min=2.0**-6)
    yield replace(NAMED["nvint8"], element=IntFormat(8, symmetric=False))


FORMATS = list(_formats())


def _bits(x: Tensor) -> Tensor:
    """Bit patterns, all NaNs as one."""
    x = torch.where(x.isnan(), torch.full_like(x, float("nan")), x).contiguous()
    return x.view(torch.int32 if x.dtype is torch.float32 else torch.int16)


def _random_bits(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).int().view(torch.float32)


def _special() -> Tensor:
    x = torch.randn(45, 77, generator=torch.Generator().manual_seed(0))
    x[3] = -0.0
    x[5, 5], x[20, 40], x[10] = float("nan"), float("inf"), 3.39e38
    x[30:34] *= 2.0**-140
    x[:, 64:70] *= 1e-30
    return x


def _assert_equal(x: Tensor, format: BlockFormat, dim: int) -> None:
    key = lowbit.Key.of(3).at(2**33 + 7) if format.rounding is Rounding.STOCHASTIC else None
    results = []
    for mode in ("off", "require"):
        with kernels.using(mode):
            values, scale = quantize_values(x, format, dim, key=key)
            results.append((values, scale, lowbit.fake_quantize(x, format, dim, key=key)))
    (values, scale, whole), (ours, our_scale, our_whole) = results
    assert values.dtype == ours.dtype and whole.dtype == our_whole.dtype
    assert ours.shape == x.shape and our_whole.shape == x.shape
    assert torch.equal(_bits(values), _bits(ours)) and torch.equal(_bits(whole), _bits(our_whole))
    assert (scale is None and our_scale is None) or torch.equal(scale, our_scale)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_equals_the_definition(format: BlockFormat) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for x in (_special(), _random_bits(40, 96, seed=1), _special().reshape(3, 15, 77)):
            for dim in range(x.dim()):
                _assert_equal(x.to(dtype), format, dim)


@pytest.mark.slow  # compiles each
def test_equals_the_definition_on_every_level(level: str) -> None:
    for format in FORMATS:
        test_equals_the_definition(format)
    for size in BLOCK_SIZES:
        for name in ("mxint8", "mxfp8", "nvfp4"):
            test_equals_the_definition_for_every_block_size(name, size)
    for name in ("mxint8", "mxfp8", "nvint8", "nvfp4"):
        test_equals_the_definition_on_three_million_bit_patterns(name)
    for format in WIDE[::6]:
        test_equals_the_definition_on_every_value_below_many_maxima(format)
    test_both_axes_in_one_read(FORMATS[0], (256, 1408), torch.bfloat16, pytest.MonkeyPatch())


@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize("name", ["mxint8", "mxfp8", "nvfp4", "int8"])
def test_equals_the_definition_for_every_block_size(
    name: str, block_size: int | tuple[int, int]
) -> None:
    format = lowbit.block_format(name, block_size=block_size)
    for dtype in (torch.float32, torch.bfloat16):
        for dim in (0, 1):
            _assert_equal(_special().to(dtype), format, dim)


@pytest.mark.parametrize("name", ["mxint8", "mxfp8", "nvint8", "nvfp4"])
def test_equals_the_definition_on_three_million_bit_patterns(name: str) -> None:
    x = _random_bits(1024, 3072, seed=2)
    for dim in (0, 1):
        _assert_equal(x.bfloat16() if dim else x, lowbit.block_format(name), dim)


def _every_value_below(amax: Tensor) -> Tensor:
    """BF16 [maxima, 128, 16]: each block holds the maximum and 15 values, all that are within 15
    binades of it; signs alternate.
    """
    below = torch.arange(128 * 15).reshape(128, 15).expand(len(amax), -1, -1)
    bits = torch.cat([torch.zeros(len(amax), 128, 1, dtype=torch.long), below], 2)
    x = (amax.view(torch.int16).long()[:, None, None] - bits).short().view(torch.bfloat16)
    return x * torch.tensor([1.0, -1.0]).bfloat16().repeat(8)


WIDE = [format for format in FORMATS if format.scale is not ScaleFormat.E8M0]


@pytest.mark.parametrize("format", [f for f in WIDE if f.rounding is Rounding.NEAREST], ids=str)
def test_equals_the_definition_on_every_value_below_many_maxima(format: BlockFormat) -> None:
    # quotients half way between two codes, and next to that, are frequent among few-bit numbers
    generator = torch.Generator().manual_seed(6)
    for size in (16, 64, (16, 16)):
        amax = torch.rand(64, generator=generator).add(0.01).bfloat16()
        x = _every_value_below(amax).reshape(-1, 512)
        for values in (x, x * 2.0**-110):  # results among the subnormals
            _assert_equal(values, replace(format, block_size=size), 1)
            _assert_equal(values.t().contiguous(), replace(format, block_size=size), 0)


@pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("avx512_bf16"), reason="nothing is divided so here"
)
def test_corrected_quotients_are_those_of_division(tmp_path: Path) -> None:
    source, program = Path(__file__).parent / "quotients.cpp", str(tmp_path / "quotients")
    flags = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fopenmp-simd")
    subprocess.run([os.environ.get("CXX", "c++"), *flags, str(source), "-o", program], check=True)
    wrong, uncorrected = map(int, subprocess.check_output([program]).split())
    assert wrong == 0 < uncorrected  # of 2^30


@pytest.mark.parametrize("first", [0, 1])  # value of the storage: lines begin elsewhere
def test_equals_the_definition_on_a_tensor_that_no_cache_holds(first: int) -> None:
    x = torch.randn(4100 * 4096 + first, generator=torch.Generator().manual_seed(7)).bfloat16()
    x = x[first:].view(4100, 4096)  # the last blocks are short
    format = lowbit.block_format("nvfp4")
    with kernels.using("require"):
        ours = lowbit.fake_quantize(x, format, 0)
    with kernels.using("off"):
        assert torch.equal(ours, lowbit.fake_quantize(x, format, 0))


@pytest.mark.parametrize("name", ["nvint8", "nvint4", "nvfp4"])
def test_equals_the_definition_at_the_end_of_the_dtype(name: str) -> None:
    largest = torch.finfo(torch.float32).max
    for step in range(64):  # some tensor scales are rounded up: the product lies beyond
        x = torch.full((2, 32), largest * (1 - step * 2.0**-24))
        x[1] *= 0.97
        _assert_equal(x, lowbit.block_format(name), 1)
        _assert_equal(x.bfloat16(), lowbit.block_format(name), 0)


@given(
    st.sampled_from(FORMATS),
    st.lists(st.integers(1, 70), min_size=1, max_size=3),
    st.sampled_from([16, 32, 5, -1]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**31),
)
@settings(max_examples=200, deadline=None)
def test_equals_the_definition_on_any_shape(
    format: BlockFormat, shape: list[int], block_size: int, dtype: torch.dtype, seed: int
) -> None:
    x = _random_bits(*shape, seed=seed).to(dtype)
    _assert_equal(x, replace(format, block_size=block_size), seed % len(shape))


@pytest.mark.parametrize("name", ["mxint8", "nvfp4"])
def test_reads_any_memory_layout(name: str) -> None:
    x = torch.randn(6, 96, 64).bfloat16()
    for view in (x.permute(2, 0, 1), x.transpose(1, 2), x[:, ::2], x[0].t(), x[0, 0, 0], x[:, :0]):
        for dim in range(max(view.dim(), 1)):
            _assert_equal(view, lowbit.block_format(name), dim)
    quantized = lowbit.fake_quantize(x[0].t(), name, 0)
    assert quantized.stride() == x[0].t().stride()  # read and written where it lies


ROWS = replace(lowbit.block_format("nvfp4"), outer_scale=lowbit.OuterScale.ROW)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 96), (70, 33), (1, 32), (33, 1), (256, 1408)])
@pytest.mark.parametrize("format", [*FORMATS[::4], ROWS], ids=str)
def test_both_axes_in_one_read(
    format: BlockFormat,
    shape: tuple[int, int],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "TRANSPOSING_PAYS", True)
    x = _random_bits(*shape, seed=4).to(dtype)
    stochastic = format.rounding is Rounding.STOCHASTIC
    keys = [lowbit.Key.of(i).at(5 * i) if stochastic else None for i in range(2)]
    backend = lowbit.Emulate()
    with kernels.using("require"):
        found = kernels.operands(x, (format, keys[0]), (format, keys[1]))
        both = backend.operands(x, (format, keys[0]), (format, keys[1]))
    in_one = isinstance(format.block_size, int) and 1 <= format.block_size <= 64
    assert (found is not None) == in_one
    with kernels.using("off"):
        for dim, ours, key in zip((1, 0), both, keys, strict=True):
            operand = backend.operand(x, format, dim, key)
            assert torch.equal(_bits(ours.values), _bits(operand.values))
            assert ours.scale is operand.scale or torch.equal(ours.scale, operand.scale)


def test_is_the_same_for_any_number_of_threads() -> None:
    x = torch.randn(300, 500).bfloat16()
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results += [lowbit.fake_quantize(x, name, 0) for name in ("mxint8", "nvfp4")]
    torch.set_num_threads(before)
    assert all(torch.equal(results[i], results[i + 2]) for i in range(4))


@pytest.mark.parametrize("name", ["mxint8", "nvfp4"])
def test_linear_is_the_same_with_and_without_kernels(name: str) -> None:
    layer = lowbit.QuantLinear.from_linear(
        torch.nn.Linear(64, 96).bfloat16(), lowbit.QuantRecipe.uniform(name)
    )
    x = torch.randn(70, 64).bfloat16().requires_grad_()
    results = []
    for mode in ("off", "require"):
        with kernels.using(mode):
            output = layer(x)
            results.append((output, *torch.autograd.grad(output.square().sum(), [x, layer.weight])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_activation_checkpointing_and_autocast_change_nothing() -> None:
    layer = lowbit.QuantLinear.from_linear(
        torch.nn.Linear(64, 96), lowbit.QuantRecipe.uniform("mxfp8")
    )
    x = torch.randn(70, 64, requires_grad=True)
    with kernels.using("require"), torch.autocast("cpu", torch.bfloat16):
        plain = torch.autograd.grad(layer(x).float().sum(), x)[0]
        again = checkpoint(layer, x, use_reentrant=False)
        assert torch.equal(torch.autograd.grad(again.float().sum(), x)[0], plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mxint8", "nvfp4"])
def test_compiles_into_one_graph(name: str) -> None:
    layer = lowbit.QuantLinear.from_linear(
        torch.nn.Linear(64, 96).bfloat16(), lowbit.QuantRecipe.uniform(name)
    )
    x = torch.randn(70, 64).bfloat16().requires_grad_()
    with kernels.using("require"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, in compiling
        compiled = torch.compile(layer, fullgraph=True)
        eager = torch.autograd.grad(layer(x).sum(), [x, layer.weight])
        ours = torch.autograd.grad(compiled(x).sum(), [x, layer.weight])
    assert all(torch.equal(a, b) for a, b in zip(eager, ours, strict=True))
