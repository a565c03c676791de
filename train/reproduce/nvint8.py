"""The NVINT8 study's measurement: formats on three kinds of data, what its three kernels keep."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit import BlockFormat, ScaleRounding, block_format, fake_quantize, qsnr_db
from train.analysis.theory import samples
from train.stats.intervals import interval

LOOPS = 5  #: that the study averages over
COUNT = 196 * 1024  #: numbers in each, 200,000 there
TOP, BOTTOM = 62, -126  #: binades of its "full range": |x| <= 4.61e18, no subnormals
MEAN_SQUARE = 2.0 ** (2 * TOP) / (2 * math.log(2) * (TOP - BOTTOM))
"""Of a log-uniform number between 2^BOTTOM and 2^TOP."""
FORMATS: dict[str, BlockFormat] = {
    **{name: block_format(name) for name in ("mxfp4", "nvfp4", "mxint4", "nvint4", "mxint8")},
    "mxint8, blocks of 16": block_format("mxint8", block_size=16),
    "nvint8": block_format("nvint8"),
    "nvint8, scale up": block_format("nvint8", scale_rule=ScaleRounding.UP),
}
DATA: dict[str, Callable[[int, int], Tensor]] = {
    "log-uniform": lambda count, seed: log_uniform(count, seed),
    "Gaussian": lambda count, seed: samples("gaussian", count, seed),
    "transformer-like": lambda count, seed: _channels(count, seed),
    "heavy-tailed": lambda count, seed: samples("student-t 4", count, seed),
}
"""The study gives the first. Its synthetic activations are not public: ours are Gaussian with one
channel in 64 thirty times as large, and Student-t with 4 degrees of freedom."""


def log_uniform(count: int, seed: int) -> Tensor:
    """Signs and exponents drawn, FP32 [count / 1024, 1024]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand((count // 1024, 1024), generator=generator, dtype=torch.float64)
    signs = torch.rand(drawn.shape, generator=generator) - 0.5
    return torch.exp2(BOTTOM + (TOP - BOTTOM) * drawn).float().copysign(signs)


def _channels(count: int, seed: int) -> Tensor:
    large = torch.where(torch.arange(1024) % 64 == 5, 30.0, 1.0)
    return samples("gaussian", count, seed) * large


Study = dict[tuple[str, str], dict[str, list[float]]]
"""By data and format: each metric's values, one a loop."""


def study(loops: int = LOOPS, count: int = COUNT) -> Study:
    """All metrics of all formats on all data."""
    found: Study = {}
    for data, draw in DATA.items():
        for seed in range(loops):
            x = draw(count, seed)
            for name, format in FORMATS.items():
                for metric, value in _metrics(x, format).items():
                    found.setdefault((data, name), {}).setdefault(metric, []).append(value)
    return found


def _metrics(x: Tensor, format: BlockFormat) -> dict[str, float]:
    """MSE is of the values; functions act on values over their root mean square, near one."""
    q = fake_quantize(x, format)
    rms = x.double().square().mean().sqrt().float()
    a, b = x / rms, q / rms
    p, r = (torch.log_softmax(values.double(), -1) for values in (a, b))
    return {
        "MSE": _mse(x, q), "QSNR dB": float(qsnr_db(x, q)), "GELU MSE": _mse(F.gelu(a), F.gelu(b)),
        "LayerNorm MSE": _mse(F.layer_norm(a, (1024,)), F.layer_norm(b, (1024,))),
        "softmax MSE": _mse(p.exp(), r.exp()),
        "softmax KL": float((p.exp() * (p - r)).sum(-1).mean()),
        "top-1 change": float((p.argmax(-1) != r.argmax(-1)).double().mean()),
    }  # fmt: skip


def _mse(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().mean())


def tabled(found: Study) -> list[dict[str, Any]]:
    """One row a kind of data and format: bits, and the means over loops."""
    return [
        {"data": data, "format": name, "bits": FORMATS[name].bits_per_value}
        | {metric: float(np.mean(values)) for metric, values in metrics.items()}
        for (data, name), metrics in found.items()
    ]


def against(found: Study, data: str, ours: str, theirs: str) -> tuple[float, float, float]:
    """How many dB of QSNR more: mean over loops, and its 95 % interval."""
    pairs = zip(found[data, ours]["QSNR dB"], found[data, theirs]["QSNR dB"], strict=True)
    told = interval(np.array([a - b for a, b in pairs]))
    return float(told.mean), float(told.low), float(told.high)


def unsound_integers(bits: int, loops: int = LOOPS) -> float:
    """MSE on log-uniform data of integers in blocks of 32 whose power-of-two scale is taken from
    the block's range, max - min, and whose codes are rounded down.

    Found by a search over scales (largest magnitude or range; exact, or a power of two below, near
    or above; up to two binades off) and roundings: it alone gives the study's MXINT8 and MXINT4.
    """
    errors = []
    for seed in range(loops):
        blocks = log_uniform(COUNT, seed).double().reshape(-1, 32)
        spread = blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True)
        scale = torch.exp2((spread / 2.0 ** (bits - 1)).log2().ceil())
        errors.append(_mse((blocks / scale).floor() * scale, blocks))
    return float(np.mean(errors))
