"""One notation for every format: what is read is written again, what differs has another name."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit import (
    Arithmetic,
    BlockFormat,
    FloatFormat,
    IntFormat,
    OuterScale,
    Rounding,
    ScaleFormat,
    ScaleRounding,
    ScaleRule,
    block_format,
)
from lowbit.formats import E2M1, MXINT8, NAMED, NVINT8, named, rules_of, to_plain

SCALES = st.one_of(
    st.sampled_from(
        [ScaleFormat.E8M0, ScaleFormat.E4M3, ScaleFormat.BF16, ScaleFormat.FP32, ScaleFormat(5, 3)]
    ),
    st.integers(1, 5).flatmap(
        lambda e: st.builds(ScaleFormat, st.just(e), st.integers(2 - min(e, 2), 8 - e))
    ),
)
ELEMENTS = st.one_of(
    st.builds(IntFormat, st.integers(2, 8)),
    st.integers(1, 5).flatmap(lambda e: st.builds(FloatFormat, st.just(e), st.integers(0, 7 - e))),
    st.just(FloatFormat(3, 4, 15.5)),
)


@st.composite
def formats(draw: Any) -> BlockFormat:
    """Any format, by a name of the table, of the grammar, of the user's or of none."""
    element, scale = draw(ELEMENTS), draw(SCALES)
    rule = draw(st.sampled_from(rules_of(scale, element)))
    size = draw(st.one_of(st.integers(1, 64), st.just(-1), st.just((4, 8))))
    outers = [None, *OuterScale][: 3 if isinstance(size, tuple) else 4]  # no rows of 2-D blocks
    outer = draw(st.sampled_from(outers)) if scale.is_minifloat else None
    name = draw(st.sampled_from(["foo", "int5", "e2m1_ue5m3"]))
    if named(name) is not None:
        element = E2M1
        rule = draw(st.sampled_from(rules_of(scale, element)))
    rounding = draw(st.sampled_from(Rounding))
    return BlockFormat(name, element, scale, size, rule, rounding, outer_scale=outer)


@given(formats())
def test_what_is_written_is_read_again(format: BlockFormat) -> None:
    assert block_format(to_plain(format)) == format


@given(formats(), formats())
def test_formats_that_differ_are_spelt_apart(one: BlockFormat, other: BlockFormat) -> None:
    assert (str(one) == str(other)) == (one == other)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ({"name": "mxint8", "block_size": 16}, replace(MXINT8, block_size=16)),
        ({"element": {"bits": 5}}, BlockFormat("mxint5", IntFormat(5))),
        (
            {"element": {"exponent_bits": 3, "mantissa_bits": 4, "max": 15.5}},
            BlockFormat("mxe3m4max15.5", FloatFormat(3, 4, max=15.5)),
        ),
        (
            {"name": "nvint8", "scale": {"exponent_bits": 5, "mantissa_bits": 3}},
            replace(NVINT8, scale=ScaleFormat(5, 3)),
        ),
        ({"element": "int8", "scale": "e4m3", "scale_rule": "up"},
         replace(NVINT8, scale_rule=ScaleRounding.UP)),
        ({"name": "mine", "element": "e1m2", "scale": "ue5m3", "outer_scale": "none"},
         BlockFormat("mine", FloatFormat(1, 2), ScaleFormat(5, 3), 32, None,
                     outer_scale=OuterScale.NONE)),
        ("nvint6", BlockFormat("nvint6", IntFormat(6), ScaleFormat.E4M3, 16, None)),
        ("e2m1_ue5m3_b16", BlockFormat("e2m1_ue5m3_b16", E2M1, ScaleFormat(5, 3), 16, None)),
        ("mxint8_b16x8", replace(MXINT8, name="mxint8_b16x8", block_size=(16, 8))),
        ({"name": "mxint8", "symmetric": False, "scale": "bf16", "arithmetic": "bf16"},
         replace(MXINT8, element=IntFormat(8, symmetric=False), scale=ScaleFormat.BF16,
                 scale_rule=None, arithmetic=Arithmetic.BF16)),
    ],
)  # fmt: skip
def test_what_a_mapping_means(written: Any, meant: BlockFormat) -> None:
    assert block_format(written) == meant


NONSENSE = {
    "max is no value": ({"element": {"exponent_bits": 4, "mantissa_bits": 3, "max": 500}}, "500"),
    "max below one": ({"element": {"exponent_bits": 4, "mantissa_bits": 3, "max": 0.5}}, "0.5"),
    "nine bits": ({"element": {"bits": 9}}, "bits=9"),
    "a float of nine bits": ({"element": {"exponent_bits": 5, "mantissa_bits": 3}}, "bits=3"),
    "half a float": ({"element": {"exponent_bits": 5}}, "mantissa_bits is missing"),
    "bits of text": ({"element": {"bits": "5"}}, "'5'"),
    "true bits": ({"element": {"bits": True}}, "True"),
    "no element": ({"block_size": 3}, "neither a format's name"),
    "a scale narrower than zero": (
        {"element": "int5", "scale": {"exponent_bits": 5, "mantissa_bits": -1}}, "bits=-1"),
    "a scale without exponent": (
        {"element": "int5", "scale": {"exponent_bits": 0, "mantissa_bits": 4}}, "bits=0"),
    "a scale of no number": (
        {"element": "int5", "scale": {"exponent_bits": 1, "mantissa_bits": 0}}, "e1m0"),
    "a scale that cannot say NaN": (
        {"element": "int5", "scale": {"exponent_bits": 5, "mantissa_bits": 3, "max": 122880}},
        "122880"),
    "a scale of no name": ({"element": "int5", "scale": "fp16"}, "'fp16'"),
    "a named one's element": ({"name": "mxint8", "element": {"bits": 5}}, "need another"),
    "a spelt one's element": ({"name": "mxint5", "element": {"bits": 6}}, "need another"),
    "the baseline's name": ({"name": "bf16", "element": {"bits": 6}}, "baseline"),
    "a name no file can bear": ({"name": "a/b", "element": "int5"}, "'a/b'"),
    "an unknown field": ({"name": "mxint8", "blocksize": 16}, "blocksize"),
    "an unknown rule": ({"name": "nvint8", "scale_rule": "down"}, "four_over_six"),
    "another's rule": ({"name": "nvint8", "scale_rule": "four_over_six"}, "nearest, up, best"),
    "e8m0's rule": ({"name": "nvint8", "scale_rule": "floor"}, "nearest, up, best"),
    "a scale above e8m0": ({"name": "mxint8", "outer_scale": "tensor"}, "outer_scale"),
    "rows of 2-D blocks": ({"name": "nvfp4_b16x16", "outer_scale": "row"}, "2-D blocks have none"),
    "an asymmetric float": ({"name": "mxfp8", "symmetric": False}, "symmetric"),
    "a block of text": ({"name": "mxint8", "block_size": "16"}, "block_size"),
    "a list": (["mxint8"], "neither"),
}  # fmt: skip


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_is_one_line(case: str) -> None:
    written, named_in_it = NONSENSE[case]
    with pytest.raises(ValueError, match=r"^[^\n]{1,200}$") as error:
        block_format(written)
    assert named_in_it in str(error.value)


def test_names_alone_stand_for_the_table() -> None:
    assert [to_plain(format) for format in NAMED.values()] == list(NAMED)
    assert block_format({"element": "int8"}) == MXINT8
    assert block_format("mxint5").scale_rule is ScaleRule.RCEIL
    for unknown in ("int5", "mxint9", "nve6m3", "mx", "zzz_b16"):
        with pytest.raises(ValueError, match=f"unknown block format '{unknown}'"):
            block_format(unknown)
