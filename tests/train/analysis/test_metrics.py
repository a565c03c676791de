"""Accumulated over batches, the metrics equal the statistics of the whole."""

import pytest
import torch

from lowbit import fake_quantize, qsnr_db
from lowbit.stats import underflow_share
from train.analysis.metrics import MeanStatistic, Qsnr


def test_batches_accumulate_to_the_whole() -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 0, 64)
    q = fake_quantize(x, "mxfp4")
    qsnr, underflow = Qsnr(), MeanStatistic(underflow_share)
    for rows in (slice(0, 3), slice(3, 8)):
        qsnr.update(x[rows], q[rows])
        underflow.update(x[rows], q[rows])
    assert float(qsnr.compute()) == pytest.approx(float(qsnr_db(x, q)), rel=1e-12)
    assert float(underflow.compute()) == pytest.approx(float(underflow_share(x, q)), rel=1e-12)
