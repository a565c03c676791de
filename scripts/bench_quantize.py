"""Time and peak memory of `fake_quantize` against `copy_`, every format along both axes.

python scripts/bench_quantize.py [--rows 8192] [--columns 4096] [--repeats 5] [--threads 1]
                                 [--dtype bfloat16] [--kernels off] [--formats mxint8 mxfp8]
                                 [--device cpu]

Every call is timed next to a `copy_` of the same tensor, alternating; a ratio is the median of the
pairs' ratios. Peak: tensor bytes alive beside the input at the worst moment, the result included,
over the input's. With torchao installed, its to_mx + dequantize of MXFP8 is timed the same way.
"""

import argparse
import logging
import statistics
import warnings
from collections.abc import Callable
from functools import partial

import torch
from timing import machine, seconds
from torch import Tensor

from lowbit import fake_quantize, kernels
from lowbit.formats import NAMED, block_format
from lowbit.kernels.cpu.memory import keep_freed_memory
from train.config.notation import plain_format
from train.plan.live_bytes import LiveBytes

Call = Callable[[], object]
WARM_UP = 8  # calls, until results lie in memory that an earlier one has left


def paired(call: Call, baseline: Call, repeats: int, device: torch.device) -> tuple[float, float]:
    """(median seconds, median ratio to the baseline's), alternating which goes first."""
    for _ in range(WARM_UP):
        call()
    times, ratios = [], []
    for repeat in range(repeats):
        if repeat % 2:
            own, other = seconds(call, device), seconds(baseline, device)
        else:
            other, own = seconds(baseline, device), seconds(call, device)
        times.append(own)
        ratios.append(own / other)
    return statistics.median(times), statistics.median(ratios)


def peak_bytes(call: Call, x: Tensor) -> int:
    """Beside `x`."""
    with LiveBytes([x]) as live:
        result = call()
    del result
    return int(live.peak - x.nbytes)


def torchao_mxfp8(x: Tensor) -> Call | None:
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao.prototype.mx_formats.config import ScaleCalculationMode
            from torchao.prototype.mx_formats.mx_tensor import MXTensor
    except ImportError:
        return None
    rceil = ScaleCalculationMode.RCEIL
    return lambda: MXTensor.to_mx(x, torch.float8_e4m3fn, 32, rceil).dequantize(x.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--kernels", choices=["off", "require"], default="off")
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu, or cuda")
    parser.add_argument("--formats", nargs="+", default=list(NAMED), metavar="FORMAT")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as `lowbit fit` does on CPUs
    x = torch.randn(args.rows, args.columns).to(args.device, getattr(torch, args.dtype))
    target = torch.empty_like(x)

    def copy() -> Tensor:
        return target.copy_(x)

    print(f"{args.dtype} [{args.rows}, {args.columns}], kernels {args.kernels}")
    print(machine(args.device))
    print(f"copy_ {1e3 * paired(copy, copy, args.repeats, args.device)[0]:.3g} ms")
    calls: dict[str, Call | None] = {}
    for format in (block_format(plain_format(name)) for name in args.formats):
        for dim in (-1, 0):
            calls[f"{format} dim {dim}"] = partial(fake_quantize, x, format, dim)
    calls["torchao mxfp8 dim -1"] = torchao_mxfp8(x)
    print(f"{'':22}{'ms':>8}{'ns/value':>10}{'x copy_':>9}{'peak / input':>14}")
    with kernels.using(args.kernels):
        for name, call in calls.items():
            if call is None:
                continue
            own, ratio = paired(call, copy, args.repeats, args.device)
            peak = peak_bytes(call, x) / x.nbytes
            each = 1e9 * own / x.numel()
            print(f"{name:22}{1e3 * own:8.2f}{each:10.3f}{ratio:9.2f}{peak:14.1f}", flush=True)


if __name__ == "__main__":
    main()
