"""Forward and backward of one linear layer under each recipe against the same layer in BF16.

python scripts/bench_linear.py [--in-features 512] [--out-features 1408] [--tokens 2048]
                               [--threads 2] [--repeats 51] [--device cpu]

All layers are timed in turn, again and again; a ratio is the median over rounds of the round's
ratio. "mxint8 PyTorch" is our definition without kernels, as emulations elsewhere are. Installed
peers are rows of the same table: torchao's emulated MXFP8 (each of the six operands through to_mx
and back, BF16 products) and microxcaling's MXINT8 linear layer (package `mx`).
"""

import argparse
import statistics
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import timing
import torch
from torch import Tensor, nn

from lowbit import Emulate, QuantLinear, QuantRecipe, bf16, kernels
from lowbit.integer import Integer
from lowbit.kernels.cpu.memory import keep_freed_memory

WITHOUT_KERNELS = ("mxint8 PyTorch",)


class _Torchao(torch.autograd.Function):
    """The three GEMMs with all operands through torchao's MXFP8."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _torchao(x) @ _torchao(weight).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad_x = _torchao(grad) @ _torchao(weight.t().contiguous()).t()
        grad_weight = _torchao(grad.t().contiguous()) @ _torchao(x.t().contiguous()).t()
        return grad_x, grad_weight


def _torchao(x: Tensor) -> Tensor:
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    found: Tensor = MXTensor.to_mx(x, torch.float8_e4m3fn, 32).dequantize(x.dtype)
    return found


def layers(base: nn.Linear) -> dict[str, Any]:
    rows: dict[str, Any] = {"bf16": base}
    for name in ("mxint8", "mxfp8", "nvfp4"):
        recipe = QuantRecipe.uniform(name)
        rows[f"{name} emulate"] = QuantLinear.from_linear(base, recipe, backend=Emulate())
    device = base.weight.device.type
    if kernels.enabled(device):
        rows["mxint8 PyTorch"] = rows["mxint8 emulate"]  # see WITHOUT_KERNELS
    if device == "cpu" and kernels.enabled():
        recipe = QuantRecipe.uniform("mxint8")
        rows["mxint8 integer"] = QuantLinear.from_linear(base, recipe, backend=Integer())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _torchao(torch.ones(32, 32))
        rows["torchao mxfp8"] = lambda x: _Torchao.apply(x, base.weight)  # type: ignore[no-untyped-call]  # torch's
    except ImportError:
        print("torchao is not installed: no row of it")
    try:
        rows["microxcaling mxint8"] = _microxcaling(base.weight)
    except ImportError:
        print("microxcaling (mx) is not installed: no row of it")
    return rows


def _microxcaling(weight: Tensor) -> Callable[[Tensor], Tensor]:
    import mx
    from mx.specs import finalize_mx_specs

    formats = {"w_elem_format": "int8", "a_elem_format": "int8"}  # of the backward pass as well
    specs = finalize_mx_specs({"scale_bits": 8, "block_size": 32, "bfloat": 16} | formats)
    return lambda x: mx.linear(x, weight, mx_specs=specs)


def seconds(name: str, layer: Any, x: Tensor, weight: Tensor, grad: Tensor) -> float:
    x.grad = weight.grad = None
    with kernels.using("off") if name in WITHOUT_KERNELS else nullcontext():
        return timing.seconds(lambda: layer(x).backward(grad), x.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--in-features", type=int, default=512)
    parser.add_argument("--out-features", type=int, default=1408)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=51)
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu, or cuda")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    keep_freed_memory()  # as `lowbit fit` does on CPUs
    base = nn.Linear(a.in_features, a.out_features, bias=False).to(a.device, torch.bfloat16)
    x = torch.randn(a.tokens, a.in_features).to(a.device, torch.bfloat16).requires_grad_()
    grad = torch.randn(a.tokens, a.out_features).to(a.device, torch.bfloat16)
    rows = layers(base)
    times: dict[str, list[float]] = {name: [] for name in rows}
    with bf16.everywhere():
        for i in range(-2, a.repeats):
            for name, layer in rows.items():
                own = seconds(name, layer, x, base.weight, grad)
                if i >= 0:
                    times[name].append(own)
    print(timing.machine(a.device))
    print(f"{a.in_features} -> {a.out_features}, {a.tokens} tokens, forward + backward")
    for name, taken in times.items():
        ratio = statistics.median(t / b for t, b in zip(taken, times["bf16"], strict=True))
        print(f"{name:20} {statistics.median(taken) * 1e3:8.2f} ms {ratio:6.2f}")


if __name__ == "__main__":
    main()
