"""The NVINT8 study: six formats on three kinds of data. Nothing is published to compare it with."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit import BlockFormat, block_format, fake_quantize, qsnr_db, quantize
from train.analysis.theory import samples

FORMATS = ("mxfp4", "nvfp4", "mxint4", "nvint4", "mxint8", "nvint8")


def study(count: int) -> list[dict[str, Any]]:
    """One row a kind of data and format, on `count` numbers as rows of 1024."""
    return [
        {"data": name} | _row(x, block_format(format))
        for name, x in _data(count).items()
        for format in FORMATS
    ]


def _data(count: int) -> dict[str, Tensor]:
    """Log-uniform over FP32's normal range, 2^-126 to 2^127, would be one binade a block to any
    format: 2^-20 to 2^20 shows the same and keeps products finite. Transformer-like: Gaussian, one
    channel in 64 thirty times as large. Heavy-tailed: Student-t of 4 degrees of freedom.
    """
    generator = torch.Generator().manual_seed(1)
    gaussian = samples("gaussian", count, seed=1)
    exponents = torch.rand(gaussian.shape, generator=generator) * 40 - 20
    outliers = torch.where(torch.arange(1024) % 64 == 5, 30.0, 1.0)
    return {
        "log-uniform": torch.exp2(exponents).copysign(gaussian),
        "transformer-like": gaussian * outliers,
        "heavy-tailed": samples("student-t 4", count, seed=1),
    }


def _row(x: Tensor, format: BlockFormat) -> dict[str, Any]:
    q = fake_quantize(x, format)
    rms = x.double().square().mean().sqrt().float()  # activations act on numbers near one
    a, b = x / rms, q / rms
    p, r = (torch.log_softmax(values.double(), -1) for values in (a, b))
    stored = quantize(x, format)
    return {
        "format": str(format), "bits": format.bits_per_value,
        "MSE": float((a - b).double().square().mean()), "QSNR dB": float(qsnr_db(x, q)),
        "GELU MSE": _mse(F.gelu(a), F.gelu(b)),
        "LayerNorm MSE": _mse(F.layer_norm(a, (1024,)), F.layer_norm(b, (1024,))),
        "softmax MSE": _mse(p.exp(), r.exp()),
        "softmax KL": float((p.exp() * (p - r)).sum(-1).mean()),
        "top-1 change %": 100 * float((p.argmax(-1) != r.argmax(-1)).double().mean()),
        "quantize ns": _nanoseconds(lambda: quantize(x, format), x),
        "dequantize ns": _nanoseconds(lambda: stored.dequantize(), x),
    }  # fmt: skip


def _mse(a: Tensor, b: Tensor) -> float:
    return float((a - b).double().square().mean())


def _nanoseconds(act: Callable[[], Any], x: Tensor) -> float:
    """Median of five, per value."""
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - began)
    return 1e9 * statistics.median(seconds) / x.numel()
