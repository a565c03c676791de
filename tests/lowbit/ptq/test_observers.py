"""Scales from outside, and scales found by search, against brute force."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lowbit import ScaleFormat, Scales, block_format, fake_quantize, quantize
from lowbit.formats import BlockFormat, IntFormat
from lowbit.ptq import Observer, Search, observe

FORMATS = ("mxfp4", "nvfp4", "mxint4", "nvint4", "mxint8", "mxfp6")
INT4 = BlockFormat("int8", IntFormat(4, symmetric=False), ScaleFormat.FP32, 64, scale_rule=None)


def _weight(rows: int = 12) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(rows, 128, generator=g) * torch.rand(rows, 1, generator=g).exp()


@pytest.mark.parametrize("name", FORMATS)
def test_own_scales_given_are_the_same_tensor(name: str) -> None:
    x = _weight()
    own = quantize(x, name)
    given = quantize(x, name, scales=Scales(own.scale_values(), own.tensor_scale))
    assert torch.equal(given.codes, own.codes) and torch.equal(given.scale, own.scale)
    assert torch.equal(given.dequantize(), fake_quantize(x, name) + 0.0)


@pytest.mark.parametrize(("name", "scale"), [("mxfp4", 3.0), ("nvfp4", 1.03), ("nvint4", 500.0)])
def test_a_scale_that_the_format_does_not_hold_is_refused(name: str, scale: float) -> None:
    own = quantize(_weight(), name)
    block = torch.full_like(own.scale_values(), scale)
    with pytest.raises(ValueError, match=f"scale {scale:g} is no value of {name}'s scales"):
        quantize(_weight(), name, scales=Scales(block, own.tensor_scale))
    with pytest.raises(ValueError, match="scales of shape"):
        quantize(_weight(), name, scales=Scales(block[:, 1:], own.tensor_scale))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", FORMATS[:4])
def test_search_after_the_cast_finds_the_best_scale_in_reach(name: str, weighted: bool) -> None:
    """NumPy tries every scale that the format has, within an octave of its own, in FP64."""
    x, format = _weight(4), block_format(name)
    importance = torch.rand(128, generator=torch.Generator().manual_seed(1)) if weighted else None
    own = quantize(x, format)
    found = observe(x, format, Observer(Search.AFTER), importance)
    h = np.ones(128) if importance is None else importance.double().numpy()
    above = 1.0 if own.tensor_scale is None else float(own.tensor_scale)
    every = own.scale.new_tensor(range(1, 127 if name.startswith("nv") else 255))
    held = replace(own, scale=every).scale_values().double().numpy()
    grid = np.array(sorted(set(format.element.values)))
    size = format.block_size
    for row in range(len(x)):
        for block in range(128 // size):
            here = slice(block * size, (block + 1) * size)
            values = x[row, here].double().numpy()
            start = float(own.scale_values()[row, block])
            near = held[(held >= start / 2) & (held <= start * 2)]
            if name.startswith("nv"):
                place = int(np.where(held == start)[0][0])
                near = held[max(0, place - 8) : place + 3]
            errors = []
            for scale in near * above:
                rounded = grid[np.abs(values[:, None] / scale - grid).argmin(1)] * scale
                errors.append((h[here] * (rounded - values) ** 2).sum())
            best = errors[int(np.where(near == float(found.block[row, block]))[0][0])]
            assert best <= min(errors) * (1 + 1e-5)


@pytest.mark.parametrize("name", FORMATS[:4])
def test_errors_fall_from_absmax_to_the_search_after_the_cast(name: str) -> None:
    x, format = _weight(64), block_format(name)

    def error(search: Search) -> float:
        scales = observe(x, format, Observer(search))
        return float((quantize(x, format, scales=scales).dequantize() - x).square().sum())

    absmax, before, after = map(error, (Search.ABSMAX, Search.BEFORE, Search.AFTER))
    assert after < absmax and after <= before


def test_fp_quants_search_before_the_cast() -> None:
    """Its 100 factors and its error, on scales that no cast changes."""
    x = _weight(5)
    found = observe(x, INT4, Observer(Search.BEFORE, reach=7.5)).block
    for row in range(5):
        for block in range(2):
            values = x[row, block * 64 : block * 64 + 64].double().numpy()
            exact = np.abs(values).max() / 7
            errors = [
                (np.abs(values - s * np.clip(np.rint(values / s), -8, 7)) ** 2.4).sum()
                for s in exact * (1 - 0.80 / 100 * np.arange(100))
            ]
            assert float(found[row, block]) == pytest.approx(
                exact * (1 - 0.008 * int(np.argmin(errors))), rel=1e-6
            )


def test_int4_with_the_largest_magnitude_at_7_5() -> None:
    x = _weight(3)
    found = observe(x, INT4, Observer(reach=7.5))
    amax = x.reshape(3, 2, 64).abs().amax(2)
    assert torch.equal(found.block, amax / 7.5)
    codes = quantize(x, INT4, scales=found).codes.reshape(3, 2, 64)
    expected = (x.reshape(3, 2, 64) / (amax / 7.5)[..., None]).round().clamp(-8, 7)
    assert torch.equal(codes.float(), expected)


def test_mxfp4_under_four_thirds() -> None:
    """2^floor(log2 amax) / 3: amax 6 has byte 129, two above OCP's, as FP-Quant stores it."""
    x = torch.tensor([[6.0] + [1.0] * 31])
    format = block_format("mxfp4")
    found = observe(x, format, Observer(four_thirds=True))
    q = quantize(x, format, scales=found)
    assert (q.scale.item(), q.tensor_scale) == (129, torch.tensor(1 / 3))
    assert q.dequantize().max().item() == pytest.approx(16 / 3)


@pytest.mark.parametrize(
    ("name", "observer", "said"),
    [
        ("mxfp4", Observer(reach=7.5), "FP32 or BF16 scales"),
        ("mxint4", Observer(four_thirds=True), "of mxfp4 alone"),
        ("nvfp4", Observer(four_thirds=True), "of mxfp4 alone"),
    ],
)
def test_what_a_format_has_no_use_for_is_refused(name: str, observer: Observer, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        observe(_weight(), block_format(name), observer)
