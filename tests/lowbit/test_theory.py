"""The closed forms against the study's printed digits and against numerical integration."""

import math
from dataclasses import replace

import numpy as np
import pytest

from lowbit import block_format
from lowbit.theory import EXACT, STUDY, Convention, crossover, curve, qsnr_theory_db

PAIRS = [("mxint8", "mxfp8"), ("mxint6", "mxfp6"), ("mxint4", "mxfp4"), ("nvint4", "nvfp4")]


def _crossings(convention: Convention) -> list[tuple[float, float]]:
    found = [crossover(block_format(a), block_format(b), convention) for a, b in PAIRS]
    return [(one.crest, one.qsnr_db) for one in found]


def test_crossings_equal_the_printed_digits_with_the_studys_constants() -> None:
    rounded = [(round(crest, 2), round(level, 2)) for crest, level in _crossings(STUDY)]
    assert rounded == [(7.55, 31.86), (1.96, 31.54), (2.04, 19.14), (2.39, 21.14)]


def test_crossings_with_the_exact_constants() -> None:
    found = [round(crest, 3) for crest, _ in _crossings(EXACT)]
    assert found == [7.484, 1.890, 1.735, 2.151]
    as_in_the_text = _crossings(replace(EXACT, rho_e4m3=1.0))[-1][0]
    assert round(as_in_the_text, 3) == 2.224


@pytest.mark.parametrize("name", ["mxfp8", "mxfp6", "mxfp4", "mxfp8_e5m2", "nvfp4"])
@pytest.mark.parametrize("crest", [1.5, 2.4, 3.5])
def test_float_error_equals_its_integral(name: str, crest: float) -> None:
    """ulp²/12 averaged over a Gaussian: x²/(24 4^M) in the normal range, a constant below it."""
    format = block_format(name)
    reach = EXACT.rho(format) * crest
    element = format.element
    x = np.linspace(0, 12, 2_400_001)
    density = np.exp(-(x**2) / 2) * math.sqrt(2 / math.pi)
    subnormal = x < reach / element.max * 2.0**element.min_exponent
    step = element.smallest * reach / element.max
    error = np.where(subnormal, step**2 / 12, x**2 / (24 * 4.0**element.mantissa_bits))
    noise = np.trapezoid(error * density, x)
    if name == "nvfp4":  # the maximum of each block of 16 is exact
        noise -= crest**2 / 16 / (24 * 4.0**element.mantissa_bits)
    assert qsnr_theory_db(format, crest) == pytest.approx(-10 * math.log10(noise), abs=1e-3)


def test_integers_lose_six_db_when_the_crest_doubles() -> None:
    format = block_format("mxint8")
    lost = qsnr_theory_db(format, 2.0) - qsnr_theory_db(format, 4.0)
    assert lost == pytest.approx(20 * math.log10(2), abs=1e-12)


def test_a_block_of_sixteen_has_no_crest_above_four() -> None:
    below, at = curve(block_format("nvfp4"), [3.9, 4.0])
    assert math.isfinite(below) and math.isnan(at)
    with pytest.raises(ValueError, match=r"crest=0\.5"):
        qsnr_theory_db(block_format("mxint8"), 0.5)


def test_formats_that_do_not_cross_are_an_error() -> None:
    with pytest.raises(ValueError, match="do not cross"):
        crossover(block_format("mxint4"), block_format("mxfp8"))
