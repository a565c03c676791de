"""The portable sources, compiled for 64-bit Arm and run by an emulator: this machine's bits."""

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
from lowbit.formats import NAMED, Rounding
from lowbit.integer import Integer
from lowbit.kernels.cpu import build
from lowbit.kernels.cpu import calls as cpu
from lowbit.kernels.cpu.library import Format, Job

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [program for program in (COMPILER, EMULATOR) if not shutil.which(program)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]
SIZES = 4, 2, 1  # bytes of the types


class Call(ctypes.Structure):
    """`Call` of foreign.cpp."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("kind", "in_type", "out_type", "buffers")),
        *(("most_code", ctypes.c_float), ("format", Format), ("job", ctypes.c_int64 * 32)),
    ]


class Arm:
    """Stands in for the library; the arguments are those of its functions, by reference."""

    def __init__(self, program: Path) -> None:
        self.command = [EMULATOR, str(program)]

    def _run(self, call: Call, job: ctypes.Structure, sizes: dict[str, int]) -> None:
        ctypes.memmove(ctypes.byref(call, Call.job.offset), ctypes.byref(job), ctypes.sizeof(job))
        places = {name: getattr(job, name) for name in sizes if getattr(job, name)}
        call.buffers = len(places)
        message = bytes(call)
        for name, place in places.items():
            where = getattr(type(job), name).offset, sizes[name]
            message += bytes((ctypes.c_int64 * 2)(*where)) + ctypes.string_at(place, sizes[name])
        done = subprocess.run(self.command, input=message, capture_output=True, check=True).stdout
        assert len(done) == sum(sizes[name] for name in places)
        for name, place in places.items():
            ctypes.memmove(place, done, sizes[name])
            done = done[sizes[name] :]

    def _quantizing(self, call: Call, job: Job) -> None:
        blocks = -(-job.rows // job.block_rows) * -(-job.columns // job.block_columns) * job.outer
        values = job.outer * job.rows * job.columns
        size = SIZES[call.in_type]
        sizes = {"x": values * size, "amax": blocks * size, "scales": 4 * blocks, "tensor_scale": 4}
        if call.kind == 0:
            sizes["out"] = values * SIZES[call.out_type]
        self._run(call, job, sizes)

    def lowbit_quantize(self, format: Any, job: Any, in_type: int, out_type: int, _: int) -> None:
        self._quantizing(Call(0, in_type, out_type, 0, 0, format._obj), job._obj)

    def lowbit_tensor_scale(self, job: Any, in_type: int, _: int, most_code: float) -> None:
        self._quantizing(Call(1, in_type, 0, 0, most_code), job._obj)

    def lowbit_integer_matmul(self, product: Any) -> int:
        p = product._obj
        sizes = {"out": p.m * p.n * (2 if p.bf16 else 4)}
        for side, rows in (("a", p.m), ("b", p.n)):
            last = [getattr(p, f"{side}_{axis}_step") for axis in ("row", "block")]
            sizes[side] = rows * p.blocks * p.size
            sizes[f"{side}_scales"] = 4 * ((rows - 1) * last[0] + (p.blocks - 1) * last[1] + 1)
        self._run(Call(2), p, sizes)
        return 0


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Arm:
    program = tmp_path_factory.mktemp("arm") / "foreign"
    flags = [flag for flag in build._FLAGS if flag not in ("-shared", "-fPIC")]
    sources = [*build._SOURCES.glob("*.cpp"), Path(__file__).with_name("foreign.cpp")]
    command = [COMPILER, *flags, *build.LEVELS["armv8-a"].flags, "-static", "-Wno-psabi"]
    command += [f"-I{build._SOURCES}", *map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True)
    return Arm(program)


@pytest.fixture
def both(arm: Arm, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """both(call): what `call` returns here, and with Arm's kernels."""

    def run(call: Any) -> tuple[Any, Any]:
        here = call()
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "library", lambda: arm)
            return here, call()

    yield run


def _inputs() -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(45, 96, generator=generator) * torch.logspace(-30, 30, 96)
    x[5, 5], x[20, 40], x[10] = float("nan"), float("inf"), 3.39e38
    x[30:34] *= 2.0**-100
    yield from (x, x.bfloat16())
    yield torch.randint(-(2**31), 2**31, (40, 96), generator=generator).int().view(torch.float32)


@pytest.mark.parametrize("name", NAMED)
def test_quantized_values(name: str, both: Any) -> None:
    formats = [NAMED[name], replace(NAMED[name], rounding=Rounding.STOCHASTIC)]
    for format in formats:
        key = lowbit.Key.of(3).at(7) if format.rounding is Rounding.STOCHASTIC else None
        for x in _inputs():
            for dim in (0, 1):
                here, there = both(
                    lambda x=x, f=format, d=dim, k=key: lowbit.fake_quantize(x, f, d, key=k)
                )
                bits = torch.int32 if x.dtype is torch.float32 else torch.int16
                same = (here.view(bits) == there.view(bits)) | (here.isnan() & there.isnan())
                assert same.all(), (format, dim, x.dtype)


@pytest.mark.parametrize(
    "shape", [(17, 9, 32), (33, 50, 256), (20, 40, 2112), (20, 16, 77)], ids=str
)
@pytest.mark.parametrize("name", ["mxint8", "mxint4", "nvint8", "int8"])
def test_integer_products(name: str, shape: tuple[int, int, int], both: Any) -> None:
    m, n, k = shape
    backend, format = Integer(), lowbit.block_format(name)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, k, generator=generator) for rows in (m, n))

    def product() -> torch.Tensor:
        left, right = (backend.operand(x, format, 1, None) for x in (a, b))
        return backend.matmul(left, right.T, None, torch.float32)

    here, there = both(product)
    assert torch.equal(here, there)
