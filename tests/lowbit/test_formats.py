"""Every named format and element, against ml_dtypes and literal sets."""

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from lowbit import (
    Arithmetic,
    BlockFormat,
    FloatFormat,
    IntFormat,
    Rounding,
    ScaleFormat,
    ScaleRule,
    block_format,
)
from lowbit.definition.codes import decode, encode
from lowbit.definition.scale import power_of_two
from lowbit.formats import ALIASES, E2M1, E2M3, E3M2, E4M3, E5M2, NAMED

ELEMENTS = [
    (E4M3, ml_dtypes.float8_e4m3fn),
    (E5M2, ml_dtypes.float8_e5m2),
    (E2M3, ml_dtypes.float6_e2m3fn),
    (E3M2, ml_dtypes.float6_e3m2fn),
    (E2M1, ml_dtypes.float4_e2m1fn),
]


def _every_code(element: FloatFormat, dtype: Any) -> np.ndarray:
    return np.arange(2**element.bits, dtype=np.uint8).view(dtype).astype(np.float32)


@pytest.mark.parametrize(("element", "dtype"), ELEMENTS)
def test_every_code_decodes_as_ml_dtypes(element: FloatFormat, dtype: Any) -> None:
    expected = _every_code(element, dtype)
    ours = decode(torch.arange(2**element.bits, dtype=torch.uint8), element).numpy()
    # bits, so that -0 counts; NaN carries no sign here
    nan = np.isnan(expected)
    assert (np.isnan(ours) == nan).all()
    assert (ours[~nan].view(np.int32) == expected[~nan].view(np.int32)).all()


@pytest.mark.parametrize(("element", "dtype"), ELEMENTS)
def test_every_value_encodes_as_ml_dtypes(element: FloatFormat, dtype: Any) -> None:
    values = _every_code(element, dtype)
    finite = np.isfinite(values)
    ours = encode(torch.from_numpy(values[finite]), element)
    assert ours.tolist() == np.flatnonzero(finite).tolist()


@pytest.mark.parametrize(("element", "dtype"), ELEMENTS)
def test_limits_are_those_of_ml_dtypes(element: FloatFormat, dtype: Any) -> None:
    info = ml_dtypes.finfo(dtype)
    assert (element.bits, element.exponent_bits, element.mantissa_bits) == (
        info.bits,
        info.nexp,
        info.nmant,
    )
    assert (element.max, element.min) == (float(info.max), float(info.min))
    assert (element.smallest, 2.0**element.min_exponent) == (
        float(info.smallest_subnormal),
        float(info.smallest_normal),
    )


def test_e8m0_scales_are_those_of_ml_dtypes() -> None:
    expected = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    ours = power_of_two(torch.arange(256, dtype=torch.uint8)).numpy()
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(("bits", "most"), [(8, 127), (6, 31), (4, 7), (2, 1)])
def test_integers_are_symmetric_unless_asked(bits: int, most: int) -> None:
    assert IntFormat(bits).values == tuple(range(-most, most + 1))
    assert IntFormat(bits, symmetric=False).values == tuple(range(-most - 1, most + 1))


def test_small_floats_hold_literally_these() -> None:
    assert E2M1.values[8:] == (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    assert E2M3.values[-5:] == (5.5, 6.0, 6.5, 7.0, 7.5)
    assert E3M2.values[-5:] == (14.0, 16.0, 20.0, 24.0, 28.0)
    assert {len(element.values) for element in (E4M3, E5M2)} == {254, 248}


def test_the_table_of_formats() -> None:
    table = {
        name: (f.element.max, f.element.smallest, f.scale.value, f.block_size, f.bits_per_value)
        for name, f in NAMED.items()
    }
    assert table == {
        "mxint8": (127, 1, "e8m0", 32, 8.25),
        "mxint6": (31, 1, "e8m0", 32, 6.25),
        "mxint4": (7, 1, "e8m0", 32, 4.25),
        "mxfp8": (448, 2**-9, "e8m0", 32, 8.25),
        "mxfp8_e5m2": (57344, 2**-16, "e8m0", 32, 8.25),
        "mxfp6": (7.5, 0.125, "e8m0", 32, 6.25),
        "mxfp6_e3m2": (28, 0.0625, "e8m0", 32, 6.25),
        "mxfp4": (6, 0.5, "e8m0", 32, 4.25),
        "nvint8": (127, 1, "e4m3", 16, 8.5),
        "nvint4": (7, 1, "e4m3", 16, 4.5),
        "nvfp4": (6, 0.5, "e4m3", 16, 4.5),
        "int8": (127, 1, "fp32", -1, 8.0),
    }
    assert all(block_format(name) == format for name, format in (NAMED | ALIASES).items())
    assert all(f.element.min == -f.element.max for f in NAMED.values())
    assert {f.scale_rule for f in NAMED.values()} == {ScaleRule.RCEIL, None}


def test_an_unknown_name_lists_the_names() -> None:
    with pytest.raises(ValueError, match=r"'mxint9'.*mxfp8_e5m2.*nvint8"):
        block_format("mxint9")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mxint8", {"block_size": 0}, "block_size=0"),
        ("mxint8", {"block_size": (16, -1)}, r"block_size=\(16, -1\)"),
        ("mxint8", {"scale_rule": None}, "e8m0 scales need a rule"),
        ("nvfp4", {"scale_rule": ScaleRule.FLOOR}, "others have none"),
        ("mxint8", {"scale_min": 2.0**-6}, "scale_min"),
        ("nvfp4", {"scale_min": 0.0}, "scale_min"),
        ("nvfp4", {"scale_min": 2.0**-10}, "scale_min"),
        ("int8", {"arithmetic": Arithmetic.BF16}, "arithmetic"),
        ("mxint8", {"arithmetic": Arithmetic.BF16, "scale_rule": ScaleRule.EVEN}, "arithmetic"),
    ],
)
def test_a_setting_without_effect_or_meaning_raises(
    name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(block_format(name), **changes)


@pytest.mark.parametrize("bits", [1, 9])
def test_integers_have_2_to_8_bits(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits={bits}"):
        IntFormat(bits)


def test_a_float_format_must_hold_its_max() -> None:
    with pytest.raises(ValueError, match=r"max=500"):
        FloatFormat(4, 3, max=500.0)


def test_a_format_shows_what_differs_from_its_name() -> None:
    assert str(block_format("mxfp8_e4m3")) == "mxfp8"
    floor = block_format("mxint8", scale_rule=ScaleRule.FLOOR, block_size=(16, 16))
    assert str(floor) == "mxint8(block_size=(16, 16), scale_rule=floor)"
    own = BlockFormat("int5", IntFormat(5), rounding=Rounding.HALF_AWAY)
    assert str(own) == "int5(rounding=half_away)"


def test_what_fits_bf16_does_and_the_rest_does_not() -> None:
    """Significant bits of all products of a code and a scale's mantissa, counted."""
    mantissas = {"e8m0": [1], "e4m3": range(8, 16), "bf16": range(128, 256), "fp32": [2**24 - 1]}
    for format in (
        *NAMED.values(),
        block_format("mxint4", scale=ScaleFormat.BF16, scale_rule=None),
    ):
        codes = {int(abs(v) / format.element.smallest) for v in format.element.values if v}
        products = (code * m for code in codes for m in mantissas[format.scale.value])
        widest = max((p // (p & -p)).bit_length() for p in products)
        assert format.fits_bf16 == (widest <= 8), (format, widest)
