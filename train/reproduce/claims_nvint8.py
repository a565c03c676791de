"""What the NVINT8 study published, "If NVINT8 exists, the performance is ...", against ours."""

import math
from collections.abc import Iterator

import numpy as np

from train.reproduce.claims import Claim
from train.reproduce.nvint8 import (
    FORMATS,
    LOOPS,
    MEAN_SQUARE,
    Study,
    against,
    unsound_integers,
)

PART = "NVINT8 study"
SIX = ("mxfp4", "nvfp4", "mxint4", "nvint4", "mxint8", "nvint8")
TOTAL_BITS = (4.25, 4.50016, 4.25, 4.50016, 8.25, 8.50016)  # of 200,000 numbers, a value
FULL_RANGE_MSE = (1.013488e33, 9.001336e32, 4.384233e34, 8.5835e32, 1.728744e32, 4.610962e30)
METRICS = ("GELU MSE", "LayerNorm MSE", "softmax MSE", "softmax KL", "top-1 change")
FIDELITY = {
    "transformer-like": (
        (0.015742, 0.014989, 0.000157, 0.052713, 0.224712),
        (0.008770, 0.008159, 0.000025, 0.013377, 0.099872),
        (0.023316, 0.021552, 0.000106, 0.050271, 0.199744),
        (0.010732, 0.011094, 0.000012, 0.008405, 0.065301),
        (0.006313, 0.004819, 0.000100, 0.042190, 0.119078),
        (0.000210, 0.000139, 0.000003, 0.001137, 0.021767),
    ),
    "heavy-tailed": (
        (0.674760, 0.022027, 0.001473, 0.324865, 0.289373),
        (0.217546, 0.008232, 0.000399, 0.094912, 0.096671),
        (0.725123, 0.025214, 0.000848, 0.241636, 0.165173),
        (0.335547, 0.013386, 0.000163, 0.035941, 0.064661),
        (0.374638, 0.007906, 0.000813, 0.192708, 0.132522),
        (0.005198, 0.000145, 0.000025, 0.005392, 0.018566),
    ),
}
"""A row a format of SIX, a column a metric."""


def nvint8_claims(found: Study) -> Iterator[Claim]:
    """Bits, errors, fidelity, why the MX integers differ, and the question that the study asks."""
    yield from _bits()
    yield from _full_range(found)
    yield from _conventions()
    yield from _fidelity(found)
    yield from _question(found)


def _bits() -> Iterator[Claim]:
    for name, published in zip(SIX, TOTAL_BITS, strict=True):
        bits = FORMATS[name].bits_per_value + 32 / 200_000 * name.startswith("nv")
        yield Claim(PART, f"{name}: bits per value", f"{published}", f"{bits:g}", bits == published)


def _full_range(found: Study) -> Iterator[Claim]:
    """Published as MSE; over the mean square of such data it is a QSNR."""
    for name, mse in zip(SIX, FULL_RANGE_MSE, strict=True):
        published = 10 * math.log10(MEAN_SQUARE / mse)
        measured = 10 * math.log10(MEAN_SQUARE / np.mean(found["log-uniform", name]["MSE"]))
        yield Claim(
            PART, f"{name} on log-uniform data, 2^-126 to 2^62: QSNR, dB",
            f"{published:.1f}", f"{measured:.1f}", abs(published - measured) < 1,
            f"agreement: within 1 dB; {_reason(name, measured - published)}",
        )  # fmt: skip


def _reason(name: str, better: float) -> str:
    if name in ("mxint4", "mxint8"):
        return f"theirs is {better:.0f} dB below a sound quantizer, see the next rows"
    if name == "nvint8":
        return "theirs lies between a scale rounded to nearest, ours here, and one rounded up"
    return "their arithmetic of scales is not public"


def _conventions() -> Iterator[Claim]:
    for name, bits in (("mxint8", 8), ("mxint4", 4)):
        mse = dict(zip(SIX, FULL_RANGE_MSE, strict=True))[name]
        found = unsound_integers(bits)
        yield Claim(
            PART, f"{name} with scales from max - min, codes rounded down: MSE",
            f"{mse:.3g}", f"{found:.3g}", abs(10 * math.log10(found / mse)) < 0.3,
            "agreement: within 0.3 dB; the one convention of a search that gives both: every small"
            " negative number becomes minus one quantum",
        )  # fmt: skip


def _fidelity(found: Study) -> Iterator[Claim]:
    for data, rows in FIDELITY.items():
        for metric, published in zip(METRICS, zip(*rows, strict=True), strict=True):
            ours = [float(np.mean(found[data, name][metric])) for name in SIX]
            theirs, own = (
                " < ".join(name for _, name in sorted(zip(values, SIX, strict=True)))
                for values in (published, ours)
            )
            yield Claim(
                PART, f"{metric} on {data} data: order of formats", theirs, own, theirs == own,
                "its data are not public; mxint8 and nvint8 as in the rows above",
            )  # fmt: skip


def _question(found: Study) -> Iterator[Claim]:
    """Would NVINT8 win? At unequal bits (8.5 : 8.25) and at equal ones, either way of rounding."""
    gain = 10 * math.log10(FULL_RANGE_MSE[4] / FULL_RANGE_MSE[5])
    for data in dict(found):
        if data[1] != "nvint8":
            continue
        for ours in ("nvint8", "nvint8, scale up"):
            for theirs in ("mxint8", "mxint8, blocks of 16"):
                mean, low, high = against(found, data[0], ours, theirs)
                published = f"wins by {gain:.1f} dB" if data[0] == "log-uniform" else "wins"
                yield Claim(
                    PART, f"{ours} over {theirs}, {data[0]}: QSNR, dB", published,
                    f"{mean:+.2f} ({low:+.2f} to {high:+.2f})", low > 0,
                    f"95 % interval over {LOOPS} draws; agreement: above zero. A scale to nearest"
                    " clips the largest value of half the blocks, one rounded up none",
                )  # fmt: skip
