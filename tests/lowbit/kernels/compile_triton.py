"""Compile the Triton kernels for GPUs of the given architectures: compile_triton.py 80 90 100.

No instruction may round otherwise than PyTorch does: no contraction, no approximate division, no
flushing of subnormals.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from lowbit.formats import NAMED, Rounding
from lowbit.kernels.gpu import calls as gpu
from lowbit.kernels.gpu import quantize as gpu_quantize
from lowbit.kernels.request import Request

FORMATS = NAMED["mxint8"], replace(NAMED["nvfp4"], rounding=Rounding.STOCHASTIC)


def calls() -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Kernels, the types of their arguments, their constants."""
    integer, random = (
        gpu.constants(Request(format, None, torch.float32).description) for format in FORMATS
    )
    tile = {"C": 32, "ROWS": 32, "COLUMNS": 64}
    yield gpu_quantize.finite_amax, {"x": "*i16", "out": "*i32"}, {"SIZE": 4096}
    for pointer, format in (("*i16", integer), ("*i32", random)):
        types = {"x": pointer, "out": pointer, "above": "*fp32", "limit": "fp32"}
        yield gpu_quantize.quantize, types, {"FORMAT": format, "APPLY": True, "R": 1} | tile
    types = {"x": "*i16", "across": "*i16", "down": "*i32"}
    types |= dict.fromkeys(("above_across", "above_down"), "*fp32")
    types |= dict.fromkeys(("limit_across", "limit_down"), "fp32")
    yield gpu_quantize.quantize_both, types, {"ACROSS": integer, "DOWN": random, "R": 16} | tile


def main() -> None:
    """One line an architecture."""
    for arch in map(int, sys.argv[1:]):
        for kernel, types, constants in calls():
            kinds = {name: types.get(name, "i64") for name in kernel.arg_names}
            kinds |= dict.fromkeys(constants, "constexpr")
            source = triton.compiler.ASTSource(kernel, kinds, constants)
            options = gpu.launch_options((32, 64))
            done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            assert done.asm["cubin"], kernel
            loose = re.findall(r"fma\.\S+|\S+\.approx\S*|\S+\.ftz\S*|div\.full\S*", done.asm["ptx"])
            assert not loose, (kernel, loose)
        print(f"sm_{arch}: compiled")


if __name__ == "__main__":
    main()
