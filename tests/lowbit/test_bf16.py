"""Two ways of multiplying BF16 matrices: float64 is the witness of both, on every machine."""

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowbit import (
    Emulate,
    Operand,
    QuantLinear,
    QuantRecipe,
    bf16,
    block_format,
    block_matmul,
    fake_quantize,
)

WAYS = ("native", "fp32")
M, K, N = 48, 160, 64


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    with bf16.using(request.param), bf16.everywhere():
        yield request.param


@pytest.fixture
def fp32() -> Iterator[None]:
    with bf16.using("fp32"), bf16.everywhere():
        yield


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """How many BF16 numbers lie between."""

    def place(x: Tensor) -> Tensor:
        bits = x.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    assert a.dtype is b.dtype is torch.bfloat16
    return (place(a) - place(b)).abs()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def positive(*shape: int) -> Tensor:
    return torch.rand(*shape).bfloat16()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# --- who decides ----------------------------------------------------------------------------------

X86 = {"avx2": True, "avx512_f": False, "avx512_bf16": False, "amx_bf16": False}


@pytest.mark.parametrize(
    ("found", "onednn", "expected"),
    [
        (X86 | {"avx512_bf16": True}, True, "native"),
        (X86 | {"amx_bf16": True}, True, "native"),
        (X86 | {"avx512_bf16": True}, False, "fp32"),  # ONEDNN_MAX_CPU_ISA keeps it off
        (X86, False, "fp32"),
        (X86 | {"avx512_f": True}, True, "fp32"),  # Skylake: oneDNN converts
        ({"neon": True}, True, "native"),  # Arm: oneDNN's word
        ({"neon": True}, False, "fp32"),
        ({}, None, "fp32"),  # a PyTorch without oneDNN
    ],
)
def test_the_cpus_unit_decides(
    found: dict[str, bool], onednn: bool | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn is not None)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    bf16.has_unit.cache_clear()
    try:
        with bf16.using("auto"):
            assert bf16.products() == expected
            assert bf16.products("cuda") == "native"
        for choice in WAYS:
            with bf16.using(choice):
                assert bf16.products() == choice
    finally:
        bf16.has_unit.cache_clear()


@pytest.mark.parametrize("choice", ["", "FP32", "bf16", "native,fp32"])
def test_other_choices_are_named(choice: str) -> None:
    with pytest.raises(ValueError, match=r"LOWBIT_BF16='.*expected one of .*auto.*native.*fp32"):
        with bf16.using(choice):
            pass


def test_fp32_is_no_choice_of_a_device_with_its_own_products() -> None:
    with bf16.using("fp32"), pytest.raises(ValueError, match=r"LOWBIT_BF16=fp32 is for CPUs.*cuda"):
        bf16.products("cuda")


# --- the six GEMMs --------------------------------------------------------------------------------


class Recording(Emulate):
    """Keeps the operands of every product."""

    def __init__(self) -> None:
        self.operands_seen: list[Tensor] = []
        self.ways: list[str] = []

    def matmul(self, a: Operand, b: Operand, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        self.operands_seen += [a.values, b.values]
        self.ways.append(bf16.products())
        return super().matmul(a, b, bias, dtype)


def three_gemms(way: str, recipe: QuantRecipe, make: Callable[..., Tensor]) -> Any:
    """Operands and results of fprop, dgrad and wgrad, and each result in float64."""
    torch.manual_seed(1)
    linear = nn.Linear(K, N, bias=False, dtype=torch.bfloat16)
    linear.weight.data = make(N, K)
    backend = Recording()
    layer = QuantLinear.from_linear(linear, recipe, backend=backend)
    x, grad = make(M, K).requires_grad_(), make(M, N)
    with bf16.using(way):
        y = layer(x)
        y.backward(grad)
    seen = [x.double() for x in backend.operands_seen]
    exact = [seen[i] @ seen[i + 1] for i in (0, 2, 4)]
    return backend.operands_seen, (y.detach(), x.grad, linear.weight.grad), exact


@pytest.mark.parametrize("name", ["mxint8", "mxfp8", "mxint4", "nvfp4"])
def test_the_ways_differ_in_the_last_bit_alone(name: str) -> None:
    """Without `everywhere`: nothing of PyTorch is changed for a quantized layer."""
    recipe = QuantRecipe.uniform(name)
    for make, most in ((positive, 1), (normal, None)):
        ours, theirs = (three_gemms(way, recipe, make) for way in ("fp32", "native"))
        assert all(map(torch.equal, ours[0], theirs[0]))
        for own, other in zip(ours[1], theirs[1], strict=True):
            apart = ulps(own, other)
            assert (apart <= 1).float().mean() >= 0.999
            assert most is None or apart.max() <= most
        if name.startswith("mx"):  # NV's tensor scales are applied to what was rounded
            for results in (ours, theirs) if make is positive else (ours,):
                for own, exact in zip(results[1], results[2], strict=True):
                    bound = 2.0**-8 * exact.abs() + K * 2.0**-24 * exact.abs().max()
                    assert ((own.double() - exact).abs() <= bound).all()


def test_a_quantized_layer_is_the_fp32_product_rounded_once() -> None:
    operands, results, _ = three_gemms("fp32", QuantRecipe.uniform("mxint8"), normal)
    for index, result in enumerate(results):
        a, b = (x.float() for x in operands[2 * index : 2 * index + 2])
        assert torch.equal(result, (a @ b).bfloat16())


@pytest.mark.parametrize("name", ["mxint8", "nvfp4", "wgrad unquantized"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_backward_and_recomputation_multiply_as_their_forward_did(
    name: str, way: str, inside: bool, checkpointed: bool
) -> None:
    """Whatever is chosen by then, within `everywhere` too; a GEMM without operands follows it, as
    `nn.Linear`'s does.
    """
    recipe = QuantRecipe.uniform("mxint8" if "wgrad" in name else name)
    recipe = recipe.only("fprop", "dgrad") if "wgrad" in name else recipe
    linear, backend = nn.Linear(K, N, dtype=torch.bfloat16), Recording()
    layer = QuantLinear.from_linear(linear, recipe, backend=backend)
    other = {"native": "fp32", "fp32": "native"}[way]
    x = normal(M, K).requires_grad_()
    with bf16.using("fp32"), bf16.everywhere() if inside else nullcontext():
        with bf16.using(way):
            y = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        with bf16.using(other):
            y.backward(normal(M, N))
    wgrad = other if "wgrad" in name else way
    again = [way] if checkpointed else []
    assert backend.ways == [way, *again, way, wgrad]  # fprop, dgrad, wgrad


def test_a_captured_way_is_its_threads_own() -> None:
    seen: list[str] = []
    with bf16.using("native"), bf16.as_captured("fp32"):
        thread = threading.Thread(target=lambda: seen.append(bf16.products()))
        thread.start()
        thread.join()
        assert [bf16.products(), *seen] == ["fp32", "native"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_layer_is_compiled_again_for_the_other_way() -> None:
    torch._dynamo.reset()
    operands = normal(M, K), nn.Linear(K, N, dtype=torch.bfloat16)
    layer = QuantLinear.from_linear(operands[1], QuantRecipe.uniform("mxint8"))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for way in (*WAYS, *WAYS):
        with bf16.using(way):
            assert torch.equal(compiled(operands[0]), layer(operands[0]))


@pytest.mark.parametrize("choice", WAYS)
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_no_operand_is_bitwise_the_baseline(choice: str, inside: bool, bias: bool) -> None:
    linear = nn.Linear(K, N, bias=bias, dtype=torch.bfloat16)
    layer = QuantLinear.from_linear(linear, QuantRecipe())
    x, grad = normal(2, M, K), normal(2, M, N)

    def results(module: nn.Module) -> list[Tensor]:
        own = x.clone().requires_grad_()
        y = module(own)
        return [y, *torch.autograd.grad(y, [own, *module.parameters()], grad)]

    with bf16.using(choice):
        if inside:
            with bf16.everywhere():
                both = results(linear), results(layer)
        else:
            both = results(linear), results(layer)
    assert all(map(torch.equal, *both))


# --- PyTorch's own products -----------------------------------------------------------------------

CALLS: dict[str, Callable[..., Tensor]] = {
    "mm": lambda a, b, c: a @ b,
    "mm of views": lambda a, b, c: a.t().contiguous().t()[:, ::2] @ b[::2],
    "mm of a broadcast": lambda a, b, c: a[:1].expand(5, -1) @ b,
    "mm without rows": lambda a, b, c: a[:0] @ b,
    "mm without sums": lambda a, b, c: a[:, :0] @ b[:0],
    "mm.out": lambda a, b, c: torch.mm(a, b, out=torch.empty_like(c)),
    "mm.out, of another shape": lambda a, b, c: torch.mm(a, b, out=a.new_empty(0)),
    "mm.out, transposed": lambda a, b, c: torch.mm(a, b, out=torch.empty_like(c.t()).t()),
    "3-D by 2-D": lambda a, b, c: a.view(4, -1, a.shape[1]) @ b,
    "linear": lambda a, b, c: F.linear(a, b.t()),
    "linear with bias": lambda a, b, c: F.linear(a.view(4, -1, a.shape[1]), b.t(), c[0]),
    "addmm": lambda a, b, c: torch.addmm(c, a, b, beta=0.5, alpha=2.0),
    "addmm without addend": lambda a, b, c: torch.addmm(c * torch.nan, a, b, beta=0),
    "addmm.out": lambda a, b, c: torch.addmm(c[0], a, b, out=torch.empty_like(c)),
    "addmm_": lambda a, b, c: c.clone().addmm_(a, b, alpha=3.0),
    "bmm": lambda a, b, c: a.view(4, -1, a.shape[1]) @ b.expand(4, -1, -1),
    "bmm.out": lambda a, b, c: torch.bmm(a[None], b[None], out=torch.empty_like(c[None])),
    "baddbmm": lambda a, b, c: torch.baddbmm(c[None], a[None], b[None], beta=2.0),
    "baddbmm_": lambda a, b, c: c[None].clone().baddbmm_(a[None], b[None]),
    "mv": lambda a, b, c: a @ b[:, 0],
    "addmv_": lambda a, b, c: c[:, 0].clone().addmv_(a, b[:, 0]),
    "dot": lambda a, b, c: a[0] @ b[:, 0],
    "einsum": lambda a, b, c: torch.einsum("ij,jk->ik", a, b),
}


@pytest.mark.parametrize("call", CALLS)
def test_torchs_products_are_rounded_once(call: str, fp32: None) -> None:
    """The witness is the same call on FP32 tensors, whose result is then rounded."""
    operands = normal(M, K), normal(K, N), normal(M, N)
    ours, wide = CALLS[call](*operands), CALLS[call](*(x.float() for x in operands))
    assert ours.dtype is torch.bfloat16
    assert wide.dtype is torch.float32
    assert torch.equal(ours, wide.bfloat16())
    assert ours.stride() == wide.stride()


@pytest.mark.parametrize("make", [positive, normal])
@pytest.mark.parametrize("call", CALLS)
def test_the_ways_of_torchs_products_differ_in_the_last_bit_alone(
    call: str, make: Callable[..., Tensor]
) -> None:
    """Those of unquantized layers, the output layer (`linear`) and eager attention (`bmm`)."""
    operands, found = (make(M, K), make(K, N), make(M, N)), []
    for choice in WAYS:
        with bf16.using(choice), bf16.everywhere():
            found.append(CALLS[call](*operands))
    apart = ulps(*found)
    assert (apart <= 1).float().mean() >= 0.999 if apart.numel() else True
    assert make is normal or not apart.numel() or apart.max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_other_dtypes_are_torchs(dtype: torch.dtype) -> None:
    a, b = (x.to(dtype) for x in (normal(M, K) * 9, normal(K, N) * 9))
    before = a @ b
    with bf16.using("fp32"), bf16.everywhere():
        assert torch.equal(a @ b, before)


@pytest.mark.parametrize("into", [False, True])
def test_torch_still_refuses_what_it_refuses(into: bool, fp32: None) -> None:
    out = {"out": torch.empty(M, N)} if into else {}
    other = normal(K, N) if into else torch.randn(K, N)
    with pytest.raises(RuntimeError, match="dtype"):
        torch.mm(normal(M, K), other, **out)


def test_torch_is_as_before_afterwards() -> None:
    a, b = normal(M, K), normal(K, N)
    before = torch.library.get_kernel("aten::mm", "CPU")
    with bf16.using("fp32"):
        with bf16.everywhere():
            with bf16.everywhere(), bf16.using("native"):
                native = a @ b
            assert torch.equal(a @ b, bf16.matmul(a, b))
    with bf16.using("native"):
        assert torch.equal(a @ b, native)
    assert repr(torch.library.get_kernel("aten::mm", "CPU")) == repr(before)


def test_autocast_and_inference_mode(fp32: None) -> None:
    a, b = torch.randn(M, K), torch.randn(K, N)
    expected = bf16.matmul(a.bfloat16(), b.bfloat16())
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(a @ b, expected)
        out = torch.empty(M, N, dtype=torch.bfloat16)
        assert torch.equal(torch.mm(a.bfloat16(), b.bfloat16(), out=out), expected)


# --- attention ------------------------------------------------------------------------------------

SHAPE = (2, 4, 40, 16)
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"is_causal": True},
    "boolean": {"attn_mask": torch.ones(40, 40, dtype=torch.bool).tril()},
    "bf16": {"attn_mask": torch.zeros(40, 40).bfloat16().triu(1) - 1},
    "grouped": {"is_causal": True, "enable_gqa": True},
    "scaled": {"scale": 0.5},
}


def attention(dtype: torch.dtype, mask: str) -> list[Tensor]:
    """Output and three gradients."""
    torch.manual_seed(2)
    heads = 2 if mask == "grouped" else SHAPE[1]
    q, g = normal(*SHAPE), normal(*SHAPE)
    k, v = (normal(SHAPE[0], heads, *SHAPE[2:]) for _ in range(2))
    operands = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    how = {
        key: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for key, x in MASKS[mask].items()
    }
    output = F.scaled_dot_product_attention(*operands, **how)
    return [output.detach(), *torch.autograd.grad(output, operands, g.to(dtype))]


@pytest.mark.parametrize("mask", MASKS)
def test_attention_against_float64(mask: str, way: str) -> None:
    """In FP32 the output alone is rounded, once; its gradients are computed from what it became."""
    found, exact = attention(torch.bfloat16, mask), attention(torch.float64, mask)
    for own, true in zip(found, exact, strict=True):
        assert own.dtype is torch.bfloat16
        error = (own.double() - true).square().mean() / true.square().mean()
        assert error.sqrt() < (2.0**-8 if way == "fp32" else 2.0**-6)
    if way == "fp32":
        half_a_unit = 2.0**-9 * 2.0 ** (torch.frexp(exact[0])[1])
        assert ((found[0].double() - exact[0]).abs() <= half_a_unit + 1e-6).all()


def test_attention_is_the_fp32_attention_rounded_once(fp32: None) -> None:
    own, wide = attention(torch.bfloat16, "causal")[0], attention(torch.float32, "causal")[0]
    assert torch.equal(own, wide.bfloat16())
    assert own.stride() == wide.stride()


# --- one product of two matrices ------------------------------------------------------------------


@pytest.mark.parametrize(
    "formats", [("mxint8", "mxint8"), ("mxfp8", None), ("nvfp4", "mxint4"), (None, None)]
)
def test_block_matmul_is_the_product_of_quantized_rows(formats: tuple[Any, Any], way: str) -> None:
    """In float64 of what `fake_quantize` makes of both along K; the dtype is that of the first."""
    a, b = torch.randn(M, K), torch.randn(N, K)
    named = [name and block_format(name) for name in formats]
    found = block_matmul(a, b, *named)
    exact = [
        x.double() if f is None else fake_quantize(x, f).double()
        for x, f in zip((a, b), named, strict=True)
    ]
    torch.testing.assert_close(found, (exact[0] @ exact[1].t()).float(), rtol=1e-5, atol=1e-4)
    narrow = block_matmul(a.bfloat16(), b.bfloat16(), *named)
    assert narrow.dtype is torch.bfloat16 and narrow.shape == (M, N)
    if formats == (None, None):
        assert torch.equal(narrow, a.bfloat16() @ b.bfloat16().t())


def test_block_matmul_quantizes_each_operand_on_its_own() -> None:
    a, b = torch.randn(M, K), torch.randn(N, K)
    plain, left = block_matmul(a, b, None), block_matmul(a, b, block_format("mxint4"))
    both = block_matmul(a, b, block_format("mxint4"), block_format("mxint4"))
    assert not torch.equal(plain, left) and not torch.equal(left, both)
    assert torch.equal(plain, a @ b.t())


@pytest.mark.parametrize("mask", ["none", "causal", "grouped"])
def test_the_ways_of_fused_attention(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's kernel rounds probabilities to BF16 before it sums, which is no sum's order: where
    nothing cancels, the last bit alone differs; elsewhere a unit of the sum of magnitudes.
    """
    for make in (positive, normal):
        monkeypatch.setitem(globals(), "normal", make)
        found = []
        for choice in WAYS:
            with bf16.using(choice), bf16.everywhere():
                found.append(attention(torch.bfloat16, mask))
        for own, other in zip(*found, strict=True):
            assert (own.double() - other.double()).norm() < 2.0**-5 * other.double().norm()
        if make is positive:  # softmax's own gradient subtracts: that of v alone has no such sum
            assert max(int(ulps(found[0][i], found[1][i]).max()) for i in (0, 3)) <= 1
        else:
            most = 2.0**-7 * found[1][0].double().abs().amax()
            assert ((found[0][0].double() - found[1][0].double()).abs() <= most).all()
