"""Scales by rule: what each wins, 4/6 done independently, and any format in exact arithmetic."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit import (
    BlockFormat,
    FloatFormat,
    IntFormat,
    Key,
    Rounding,
    ScaleFormat,
    ScaleRounding,
    ScaleRule,
    block_format,
    fake_quantize,
    kernels,
    qsnr_db,
    quantize,
)
from lowbit.formats import E2M1, NAMED, OuterScale, rules_of

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
NV = ("nvint8", "nvint4", "nvfp4")
_NORMAL = torch.randn(200, 1024, generator=torch.Generator().manual_seed(0))
_CHI = torch.randn(4, 200, 1024, generator=torch.Generator().manual_seed(1)).square().sum(0)
DATA = {"gaussian": _NORMAL, "student-t 4": _NORMAL / (_CHI / 4).sqrt()}


def _db(x: Tensor, name: str, rule: str) -> float:
    return float(qsnr_db(x, fake_quantize(x, block_format(name, scale_rule=rule))))


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("name", [*NV, "mxint8", "mxint4", "mxfp4", "e2m1_ue5m3"])
def test_best_is_no_worse_than_either_neighbour(name: str, data: str) -> None:
    rules = ("rceil", "floor") if name.startswith("mx") else ("nearest", "up")
    found = {rule: _db(DATA[data], name, rule) for rule in (*rules, "best")}
    assert found["best"] >= max(found.values())


def test_rounding_up_wins_seven_decibels_for_nvint8() -> None:
    assert _db(_NORMAL, "nvint8", "up") >= 45.5
    assert _db(_NORMAL, "nvint8", "nearest") < 39.5


def test_four_over_six_equals_an_independent_one() -> None:
    x = DATA["student-t 4"].numpy()
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    grid = np.array([torch.tensor(c, dtype=torch.uint8).view(torch.float8_e4m3fn).item()
                     for c in range(1, 127)])  # fmt: skip
    blocks, above = x.reshape(-1, 16), np.float32(np.abs(x).max() / np.float32(1536))
    ratio = np.abs(blocks).max(1) / np.float32(6) / above

    def cast(wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at = np.abs(grid - wanted[:, None].astype(np.float64)).argmin(1)
        y = blocks / (grid[at].astype(np.float32) * above)[:, None]
        code = values[np.abs(values - np.abs(y)[..., None]).argmin(2)] * np.sign(y)
        real = code * grid[at][:, None] * np.float64(above)
        return np.float32(code * grid[at][:, None]) * above, ((blocks - real) ** 2).sum(1)

    (six, at_six), (four, at_four) = cast(ratio), cast(ratio * np.float32(1.5))
    wanted = np.where((at_four < at_six)[:, None], four, six).reshape(x.shape)
    ours = fake_quantize(torch.from_numpy(x), block_format("nvfp4", scale_rule="four_over_six"))
    assert (ours.numpy() == wanted).all()
    assert 0.2 < (at_four < at_six).mean() < 0.6


POWERS = [Fraction(2) ** e for e in range(-127, 128)]


def _fp32(exact: Fraction) -> Fraction:
    """Rounded to FP32, to nearest even; no overflow occurs here."""
    if exact == 0:
        return exact
    ulp = Fraction(2) ** (max(_exponent(abs(exact)), -126) - 23)
    return round(exact / ulp) * ulp


def _exponent(x: Fraction) -> int:
    """Of the largest power of two that is not above `x` > 0."""
    guess = x.numerator.bit_length() - x.denominator.bit_length()
    return guess if Fraction(2) ** guess <= x else guess - 1


def _nearest(y: Fraction, values: list[Fraction], half_away: bool) -> Fraction:
    """Of ascending magnitudes: saturates; a tie goes to the even code, or away from zero."""
    size = abs(y)
    above = bisect_left(values, size)
    beside = range(max(above - 1, 0), min(above + 1, len(values)))
    at = min(beside, key=lambda i: (abs(values[i] - size), -i if half_away else i % 2))
    return -values[at] if y < 0 else values[at]


@cache
def _magnitudes(grid: Any) -> list[Fraction]:
    if grid == ScaleFormat.BF16:
        raise NotImplementedError
    top = 2 ** (grid.exponent_bits + grid.mantissa_bits)
    return [Fraction(v) for v in map(grid.decode, range(top)) if v == v and v <= grid.max]


def _element_values(format: BlockFormat) -> list[Fraction]:
    if isinstance(format.element, IntFormat):
        return [Fraction(i) for i in range(format.element.max + 1)]
    return _magnitudes(format.element)


def _scales(amax: Fraction, format: BlockFormat, above: Fraction | None) -> list[Fraction]:
    """The candidates, of which the first wins ties."""
    most = Fraction(format.element.max)
    if format.scale == ScaleFormat.E8M0:
        return _powers(amax, most, format)
    ratio = _fp32(amax / most) if above is None else _fp32(_fp32(amax / most) / above)
    if format.scale == ScaleFormat.FP32:
        return [ratio or Fraction(1)]
    if format.scale == ScaleFormat.BF16:
        down = _bf16_down(ratio)
        up = down if down == ratio else down + _bf16_step(ratio)
        even = down if round(down / _bf16_step(ratio)) % 2 == 0 else up
        middle = (down + up) / 2
        near = even if ratio == middle else (down if ratio < middle else up)
        return [s or Fraction(1) for s in _by_rule(format, near, up, down)]
    values = _magnitudes(format.scale)[1:]
    grid = [Fraction(0), *values]
    ratio = min(max(ratio, values[0]), values[-1])
    up = min(v for v in values if v >= ratio)
    down = max(v for v in values if v <= ratio)
    if format.scale_rule is ScaleRounding.FOUR_OVER_SIX:
        own = _fp32(amax / most) if above is None else _fp32(_fp32(amax / most) / above)
        wider = min(max(_fp32(own * Fraction(3, 2)), values[0]), values[-1])
        return [_nearest(r, grid, format.scale.mantissa_bits == 0) for r in (ratio, wider)]
    # without mantissa bits a tie lies between one and two steps, of which two are even
    near = _nearest(ratio, grid, format.scale.mantissa_bits == 0)
    return _by_rule(format, near, up, down)


def _by_rule(format: BlockFormat, near: Fraction, up: Fraction, down: Fraction) -> list[Fraction]:
    rule = format.scale_rule
    return {ScaleRounding.UP: [up], ScaleRounding.BEST: [up, down]}.get(rule, [near])


def _bf16_step(x: Fraction) -> Fraction:
    return Fraction(2) ** (max(_exponent(x), -126) - 7 if x else -133)


def _bf16_down(x: Fraction) -> Fraction:
    return x // _bf16_step(x) * _bf16_step(x)


def _powers(amax: Fraction, most: Fraction, format: BlockFormat) -> list[Fraction]:
    def least(holds: Callable[[Fraction], bool]) -> Fraction:
        return POWERS[bisect_left(POWERS, True, key=holds)]

    emax = least(lambda s: s * 2 > most)
    match format.scale_rule:
        case ScaleRule.RCEIL:
            return [least(lambda s: amax <= s * most)]
        case ScaleRule.CEIL:
            return [least(lambda s: amax <= s * emax)]
        case ScaleRounding.BEST:
            up = least(lambda s: amax <= s * most)
            floor = least(lambda s: amax < 2 * s * most)
            return [up, floor]
    if format.scale_rule is ScaleRule.EVEN and amax:
        step = Fraction(2) ** (_exponent(amax) - format.element.mantissa_bits)
        amax = (amax / step + Fraction(1, 2)) // 1 * step
    return [least(lambda s: amax < 2 * s * emax)]


def _oracle(x: list[Fraction], total: Fraction, format: BlockFormat) -> list[Fraction]:
    """One block's values; `total` is the largest magnitude under its outer scale."""
    above = None
    if format.outer is not OuterScale.NONE:
        reach = _fp32(Fraction(format.most_scale) * Fraction(format.element.max))
        floor = max(Fraction(2) ** -117, Fraction(2) ** -126 / Fraction(format.scale.smallest))
        above = max(_fp32(total / reach), floor)
    values = _element_values(format)
    no_mantissa = not isinstance(format.element, IntFormat) and format.element.mantissa_bits == 0
    best: tuple[Fraction, list[Fraction]] | None = None
    for scale in _scales(max(map(abs, x)), format, above):
        divisor = scale if above is None else _fp32(scale * above)
        away = format.rounding is Rounding.HALF_AWAY
        y = [v / divisor if format.scale == ScaleFormat.E8M0 else _fp32(v / divisor) for v in x]
        near = [_nearest(v, values, no_mantissa) * scale * (above or 1) for v in y]
        error = sum((v - q) ** 2 for v, q in zip(x, near, strict=True))
        codes = [_nearest(v, values, away or no_mantissa) for v in y]
        if best is None or error < best[0]:
            best = error, [c * scale if above is None else _fp32(_fp32(c * scale) * above)
                           for c in codes]  # fmt: skip
    assert best is not None
    return best[1]


@st.composite
def any_format(draw: Any) -> BlockFormat:
    element, scale = draw(ELEMENTS), draw(SCALES)
    rule = draw(st.sampled_from(rules_of(scale, element)))
    rounding = draw(st.sampled_from([Rounding.NEAREST, Rounding.HALF_AWAY]))
    outer = draw(st.sampled_from(["none", "tensor", "row"])) if scale.is_minifloat else None
    size = draw(st.sampled_from([1, 3, 4, 8, 16, 32]))
    format = BlockFormat("foo", element, scale, size, rule, rounding)
    return block_format(format, outer_scale=outer)


@settings(max_examples=200)
@given(any_format(), st.integers(0, 2**20), st.booleans(), st.booleans())
def test_any_format_in_exact_arithmetic_and_in_kernels(
    format: BlockFormat, seed: int, narrow: bool, across: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 12, generator=generator) * 2.0 ** torch.randint(
        -6, 6, (6, 12), generator=generator
    )
    x = x.bfloat16() if narrow else x
    dim = int(across)
    with kernels.using("off"):
        defined = fake_quantize(x, format, dim)
        random = replace(format, rounding=Rounding.STOCHASTIC)
        drawn = fake_quantize(x, random, dim, key=Key.of(seed))
    assert torch.equal(fake_quantize(x, format, dim), defined)
    assert torch.equal(fake_quantize(x, random, dim, key=Key.of(seed)), drawn)
    assert torch.equal(quantize(x, format, dim).dequantize(x.dtype), defined)
    rows = x.float() if across else x.float().T
    found, most = defined if across else defined.T, x.float().abs().max()
    for row, ours in zip(rows.tolist(), found.tolist(), strict=True):
        total = Fraction(max(map(abs, row)) if format.outer is OuterScale.ROW else float(most))
        for begin in range(0, len(row), format.block_size):
            block = [Fraction(v) for v in row[begin : begin + format.block_size]]
            wanted = torch.tensor([float(v) for v in _oracle(block, total, format)]).to(x.dtype)
            assert ours[begin : begin + format.block_size] == wanted.tolist(), (str(format), block)


def test_the_named_formats_keep_their_rules() -> None:
    assert all(rules_of(f.scale, f.element)[0] in (f.scale_rule, ScaleRounding.NEAREST)
               for f in NAMED.values())  # fmt: skip
    assert ScaleRounding.FOUR_OVER_SIX in rules_of(ScaleFormat.E4M3, E2M1)
