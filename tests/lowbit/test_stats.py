"""QSNR and crest factors, by hand and against the study's table."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit import Key, Rounding, ScaleRule, crest_factor, fake_quantize, qsnr_db
from lowbit.formats import MXFP8, MXINT8, NAMED
from lowbit.stats import clamp_counts

pytestmark = pytest.mark.usefixtures("definition")

# paper.md 1.5: FP64 arithmetic, an independent quantizer, 2M samples, dB
COLUMNS = ["mxint8", "mxfp8", "mxfp8 floor", "mxfp8_e5m2", "mxint6", "mxfp6", "mxint4", "mxfp4"]
COLUMNS += ["nvint4", "nvfp4"]
ORACLE = {
    "gaussian": [41.61, 31.52, 30.66, 25.54, 29.42, 30.96, 16.83, 18.74, 21.27, 20.43],
    "laplace": [39.92, 31.53, 29.98, 25.54, 27.68, 30.23, 14.90, 17.58, 19.78, 20.66],
    "student-t": [39.22, 31.55, 29.87, 25.55, 26.98, 29.93, 14.26, 17.12, 19.39, 20.74],
}
WITHIN = {"gaussian": 0.05, "laplace": 0.05, "student-t": 0.4}
CREST = {"gaussian": (2.368, 2.111), "laplace": (2.893, 2.444), "student-t": (2.934, 2.416)}


@pytest.fixture(scope="module", params=ORACLE)
def sample(request: pytest.FixtureRequest) -> tuple[str, Tensor]:
    generator = np.random.default_rng(0)
    draw = {
        "gaussian": generator.standard_normal,
        "laplace": generator.laplace,
        "student-t": lambda size: generator.standard_t(4, size),
    }[request.param]
    size = (2048, 1024) if request.param == "student-t" else (1024, 1024)
    return request.param, torch.from_numpy(draw(size=size).astype(np.float32))


@pytest.mark.parametrize("column", COLUMNS)
def test_qsnr_of_the_studys_table(sample: tuple[str, Tensor], column: str) -> None:
    name, x = sample
    format = NAMED[column.split()[0]]
    if column.endswith("floor"):
        format = replace(format, scale_rule=ScaleRule.FLOOR)
    expected = ORACLE[name][COLUMNS.index(column)]
    assert float(qsnr_db(x, fake_quantize(x, format))) == pytest.approx(expected, abs=WITHIN[name])


def test_crest_factors_of_the_studys_table(sample: tuple[str, Tensor]) -> None:
    name, x = sample
    for block_size, expected in zip((32, 16), CREST[name], strict=True):
        mean = float(crest_factor(x, block_size).mean())
        assert mean == pytest.approx(expected, abs=0.004)


@pytest.mark.parametrize(
    ("rule", "decibels"),
    [
        (ScaleRule.FLOOR, [41.64, 29.59, 17.54, 30.68, 25.38, 30.93, 25.38, 18.81]),
        (ScaleRule.RCEIL, [41.59, 29.41, 16.83, 31.50, 25.55, 30.95, 25.55, 18.74]),
        (ScaleRule.CEIL, [None, None, None, 31.50, 25.55, 28.74, 25.55, 16.81]),
        (ScaleRule.EVEN, [None, None, None, 31.18, 25.55, 30.97, 25.55, 19.03]),
    ],
)
def test_qsnr_of_each_rule_on_gaussians(rule: ScaleRule, decibels: list[float | None]) -> None:
    """numerics.md 3.6."""
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    formats = [format for format in NAMED.values() if format.scale_rule]
    for format, expected in zip(formats, decibels, strict=True):
        if expected is not None:
            measured = qsnr_db(x, fake_quantize(x, replace(format, scale_rule=rule)))
            assert float(measured) == pytest.approx(expected, abs=0.1), format


def test_qsnr_by_hand() -> None:
    x = torch.tensor([3.0, 4.0])
    assert float(qsnr_db(x, torch.tensor([3.0, 4.5]))) == pytest.approx(20.0)
    assert float(qsnr_db(x, x)) == math.inf
    assert float(qsnr_db(x.bfloat16(), torch.zeros(2))) == 0.0


def test_crest_factor_by_hand() -> None:
    x = torch.tensor([[1.0, -1.0, 1.0, 1.0], [0.0, -2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert crest_factor(x, 4)[:2].flatten().tolist() == [1.0, 2.0]
    assert crest_factor(x, 4)[2].isnan()
    assert crest_factor(x.t(), 4, dim=0)[0, :2].tolist() == [1.0, 2.0]
    assert crest_factor(x[:1, :3], 4).item() == pytest.approx(math.sqrt(4 / 3))  # filled with 0
    assert crest_factor(x, -1).shape == (3, 1)


def test_clamp_counts_by_hand() -> None:
    floor = replace(MXINT8, scale_rule=ScaleRule.FLOOR)
    x = torch.tensor([[-127.75] * 3 + [127.6] * 2 + [1.0] * 27, [100.0] * 32])
    counts = clamp_counts(x, floor)
    assert (counts.total, int(counts.clamped), int(counts.minus_128)) == (64, 5, 3)
    both = counts + counts
    assert (both.total, int(both.clamped), int(both.minus_128)) == (128, 10, 6)
    exact = clamp_counts(x, MXINT8)
    assert (int(exact.clamped), int(exact.minus_128)) == (0, 0)
    fp8 = clamp_counts(
        torch.tensor([511.0, 449.0, 448.0]), replace(MXFP8, scale_rule=floor.scale_rule)
    )
    assert int(fp8.clamped) == 1  # 449 rounds to 448
    stochastic = replace(floor, rounding=Rounding.STOCHASTIC)
    assert int(clamp_counts(x, stochastic, key=Key.of(0)).clamped) <= 5
