"""The integer product against float64 on the dequantized operands, and against emulation."""

import math
from dataclasses import replace

import pytest
import torch

import lowbit
from lowbit import kernels
from lowbit.backend import Emulate
from lowbit.integer import Integer, IntegerOperand

pytestmark = pytest.mark.skipif(not kernels.enabled(), reason="no C++ compiler")
SHAPES = [(17, 9, 32), (33, 50, 256), (64, 17, 512), (48, 40, 8192), (20, 16, 77)]


def _operands(name: str, m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(m + n + k)
    return torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["mxint8", "mxint6", "mxint4", "nvint8", "nvint4", "int8"])
def test_error_against_float64(name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    a, b = (x.to(dtype) for x in _operands(name, *shape))
    backend = Integer()
    left, right = backend.operand(a, lowbit.block_format(name), 1, None), None
    for dim, stored in ((1, b), (0, b.t().contiguous())):
        right = backend.operand(stored, lowbit.block_format(name), dim, None)
        product = backend.matmul(left, right.T if dim == 1 else right, None, torch.float32)
        wide = [lowbit.quantize(x, name, 1).dequantize().double() for x in (a, b)]
        exact = wide[0] @ wide[1].t()
        assert float((product - exact).norm() / exact.norm()) <= 2e-7


def test_is_the_same_for_any_number_of_threads() -> None:
    a, b = _operands("mxint8", 130, 300, 1024)
    backend, results, before = Integer(), [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        left = backend.operand(a, lowbit.block_format("mxint8"), 1, None)
        right = backend.operand(b, lowbit.block_format("mxint8"), 1, None)
        results.append(backend.matmul(left, right.T, None, torch.float32))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def _defined(a: IntegerOperand, b: IntegerOperand) -> torch.Tensor:
    """The product's bits: exact sums within a block, fused multiply-adds across 32, then sums."""
    assert a.block_scales is not None and b.block_scales is not None
    blocks = a.block_scales.shape[1]
    left, right = (x.values.double().unflatten(1, (blocks, -1)) for x in (a, b))
    total = torch.zeros(left.shape[0], right.shape[0])
    for span in torch.arange(blocks).split(32):
        sums = torch.zeros_like(total)
        for i in span.tolist():
            dots = (left[:, i] @ right[:, i].t()).float() * b.block_scales[:, i]
            sums = (dots.double() * a.block_scales[:, i, None].double() + sums.double()).float()
        total = total + sums
    return total


def _assert_defined(name: str, shape: tuple[int, int, int]) -> None:
    backend, format = Integer(), lowbit.block_format(name)
    left, right = (backend.operand(x, format, 1, None) for x in _operands(name, *shape))
    assert isinstance(left, IntegerOperand) and isinstance(right, IntegerOperand)
    whole = [replace(x, scale=None) for x in (left, right.T)]
    product = backend.matmul(*whole, None, torch.float32)
    assert torch.equal(product, _defined(left, right))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["mxint8", "mxint4", "nvint8", "int8"])
def test_has_the_bits_of_its_definition(name: str, shape: tuple[int, int, int]) -> None:
    _assert_defined(name, shape)


def _product(a: torch.Tensor, b: torch.Tensor, scales: list[torch.Tensor]) -> torch.Tensor:
    found: torch.Tensor = torch.ops.lowbit.integer_matmul(
        a.to(torch.int8), scales[0], b.to(torch.int8), scales[1], torch.float32
    )
    return found


@pytest.mark.parametrize("extremes", [(-128, -128), (-128, 127), (127, -128), (127, 127)], ids=str)
@pytest.mark.parametrize("size", [16, 32, 48, 256])
def test_is_exact_at_the_ends_of_the_codes(extremes: tuple[int, int], size: int) -> None:
    a = torch.full((19, size), float(extremes[0]))
    b = torch.full((35, size), float(extremes[1]))
    a[7, ::2], b[9, 1::2] = 127, -1
    ones = [torch.ones(19, 1), torch.ones(35, 1)]
    assert torch.equal(_product(a, b, ones).double(), a.double() @ b.double().t())
    a, b = (torch.randint(-128, 128, (n, size)) for n in (19, 35))
    assert torch.equal(_product(a, b, ones).long(), a @ b.t())


@pytest.mark.parametrize("size", [131_008, 131_072, 133_152, 400_016])
@pytest.mark.parametrize("code", [127, -128])
def test_long_blocks_do_not_wrap(size: int, code: int) -> None:
    a, b = torch.full((2, 2 * size), code), torch.full((3, 2 * size), code)
    b[1, :size] = -1
    b[2] *= torch.tensor([1, 0]).repeat(size)
    scales = [torch.tensor([[2.0, 4.0]]).expand(n, 2) for n in (2, 3)]
    exact = sum(
        s * s * (x.double() @ y.double().t())
        for s, x, y in zip((2, 4), a.split(size, 1), b.split(size, 1), strict=True)
    )
    torch.testing.assert_close(_product(a, b, scales).double(), exact, rtol=2e-7, atol=0)


SCALES = [(2.0**-120, 2.0**120), (2.0**120, 2.0**-120), (2.0**-127, 2.0**127), (1e-30, 3e35)]


@pytest.mark.parametrize("scales", SCALES, ids=str)
def test_scales_that_cancel_do_not_overflow(scales: tuple[float, float]) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-127, 128, (n, 64 * 32), generator=generator) for n in (19, 40))
    a[3, :32] = 0
    large = [torch.full((n, 64), s) for n, s in zip((19, 40), scales, strict=True)]
    exact = large[0][0, 0].double() * large[1][0, 0].double() * (a.double() @ b.double().t())
    found = _product(a, b, large).double()
    assert float((found - exact).norm() / exact.norm()) <= 2e-7
    if scales[0] * scales[1] == 1:  # powers of two: no bit differs
        assert torch.equal(found.float(), _product(a, b, [x * 0 + 1 for x in large]))


def test_what_overflows_is_infinite_and_what_is_nothing_stays_so() -> None:
    a, b = torch.tensor([[1] * 32, [0] * 32]), torch.ones(1, 32)
    large = [torch.full((2, 1), 2.0**100), torch.full((1, 1), 2.0**100)]
    assert _product(a, b, large).flatten().tolist() == [math.inf, 0]
    large[1] = torch.full((1, 1), math.nan)
    assert _product(a, b, large).isnan().all()


@pytest.mark.slow  # compiles each
def test_has_the_bits_of_its_definition_on_every_level(level: str) -> None:
    for name in ("mxint8", "mxint4", "nvint8", "int8"):
        for shape in SHAPES:
            _assert_defined(name, shape)
    for codes in ((-128, -128), (-128, 127), (127, -128)):
        for size in (16, 32, 48, 256):
            test_is_exact_at_the_ends_of_the_codes(codes, size)
    for code in (127, -128):
        test_long_blocks_do_not_wrap(133_152, code)
    for scales in SCALES:
        test_scales_that_cancel_do_not_overflow(scales)
    test_what_overflows_is_infinite_and_what_is_nothing_stays_so()
    test_a_block_that_is_not_finite_spoils_its_row_alone()


def test_a_block_that_is_not_finite_spoils_its_row_alone() -> None:
    a, b = _operands("mxint8", 40, 20, 64)
    a[3, 40] = float("inf")
    backend = Integer()
    left = backend.operand(a, lowbit.block_format("mxint8"), 1, None)
    right = backend.operand(b, lowbit.block_format("mxint8"), 1, None)
    nan = backend.matmul(left, right.T, None, torch.float32).isnan()
    assert nan[3].all() and nan.sum() == 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_computes_what_emulation_does(dtype: torch.dtype) -> None:
    linear = torch.nn.Linear(64, 96).to(dtype)
    x = torch.randn(70, 64).to(dtype).requires_grad_()
    results = []
    for backend in (Emulate(), Integer()):
        layer = lowbit.QuantLinear.from_linear(
            linear, lowbit.QuantRecipe.uniform("mxint8"), backend=backend
        )
        output = layer(x)
        results.append([output, *torch.autograd.grad(output.sum(), [x, linear.weight])])
    for emulated, integer in zip(*results, strict=True):
        step = torch.finfo(dtype).eps * emulated.abs().max()
        assert bool(((emulated - integer).abs() <= 2 * step).all())


def test_refuses_what_it_cannot_do() -> None:
    backend, x = Integer(), torch.randn(32, 32)
    formats = [lowbit.block_format("mxfp8")]
    formats += [lowbit.block_format("mxint8", block_size=size) for size in (8, (16, 16))]
    for format in formats:
        with pytest.raises(ValueError, match="integer backend has no"):
            backend.operand(x, format, 1, None)
    quantized = backend.operand(x, lowbit.block_format("mxint8"), 1, None)
    with pytest.raises(ValueError, match="plain operand"):
        backend.matmul(quantized, backend.operand(x, None, 0, None), None, torch.float32)
    plain = backend.matmul(*(backend.operand(x, None, 0, None),) * 2, None, torch.float32)
    assert torch.equal(plain, x @ x)
