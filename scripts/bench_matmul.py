"""The integer product of mxint8 operands against PyTorch's FP32 (or BF16) product of that shape.

python scripts/bench_matmul.py [--threads 2] [--repeats 51] [--against bfloat16]

Every product is timed next to PyTorch's; a ratio is the median of the pairs' ratios. Operands are
quantized beforehand. The error is Frobenius-relative, FP32 output against float64. As on a
processor with AVX2 alone (with AVX-VNNI: LOWBIT_MARCH=x86-64-v3+avxvnni):

LOWBIT_MARCH=x86-64-v3 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 \\
    ONEDNN_MAX_CPU_ISA=AVX2 python scripts/bench_matmul.py
"""

import argparse
import statistics

import torch
from timing import machine, seconds

from lowbit import block_format, fake_quantize
from lowbit.integer import Integer
from lowbit.kernels.cpu.memory import keep_freed_memory

CPU = torch.device("cpu")
SHAPES = [(2048, 1408, 512), (2048, 512, 1408), (1408, 512, 2048), (512, 512, 8192)]


def row(m: int, n: int, k: int, repeats: int, dtype: torch.dtype) -> str:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(m, k, generator=generator).to(dtype)
    b = torch.randn(n, k, generator=generator).to(dtype)
    backend, format = Integer(), block_format("mxint8")
    left, right = backend.operand(a, format, 1, None), backend.operand(b, format, 1, None).T
    ours = [0.0] * repeats
    other = [0.0] * repeats
    for i in range(-2, repeats):
        theirs = seconds(lambda: a @ b.t(), CPU)
        mine = seconds(lambda: backend.matmul(left, right, None, dtype), CPU)
        if i >= 0:
            ours[i], other[i] = mine, theirs
    exact = fake_quantize(a, format).double() @ fake_quantize(b, format).double().t()
    product = backend.matmul(left, right, None, torch.float32)
    error = float((product - exact).norm() / exact.norm())
    ratio = statistics.median(x / y for x, y in zip(ours, other, strict=True))
    rate = 2 * m * n * k / statistics.median(ours) / 1e9
    return (
        f"{m:6} {n:6} {k:6} {statistics.median(other) * 1e3:9.2f} "
        f"{statistics.median(ours) * 1e3:10.2f} {ratio:6.2f} {rate:8.0f} {error:9.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=51)
    parser.add_argument("--against", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as `lowbit fit` does on CPUs
    print(machine(CPU))
    print(f"     m      n      k {arguments.against:>9} integer ms  ratio    Gop/s     error")
    for shape in SHAPES:
        print(row(*shape, arguments.repeats, getattr(torch, arguments.against)), flush=True)


if __name__ == "__main__":
    main()
