"""Counter-based numbers: uniform, repeatable, split as the whole; stochastic rounding unbiased."""

import math
from dataclasses import replace

import pytest
import torch

from lowbit import BlockFormat, Key, Randomness, Rounding, ScaleRule, fake_quantize, quantize
from lowbit.definition.noise import _mix, uniform
from lowbit.formats import INT8, MXFP8, MXINT8, NAMED, NVFP4, NVINT4

pytestmark = pytest.mark.usefixtures("definition")

STOCHASTIC = [replace(format, rounding=Rounding.STOCHASTIC) for format in NAMED.values()]
NEVER_CLIPPING = [format for format in STOCHASTIC if not format.clips]


def test_what_is_drawn_never_changes() -> None:
    """Golden numbers: a resumed or compared run must draw what it drew before."""
    drawn = uniform((2, 3), Key.of(1).fold(2).at(3)) * 2**24
    assert drawn.long().tolist() == [[4839627, 16071421, 8271698], [14928986, 1830554, 7305326]]


def _mix_in_python(x: int) -> int:
    for _ in range(2):
        x = (x >> 16 ^ x) * 0x45D9F3B % 2**32
    return x >> 16 ^ x


def test_mix_is_the_hash_it_claims_to_be() -> None:
    x = torch.randint(0, 2**32, (1000,), generator=torch.Generator().manual_seed(0))
    assert _mix(x).tolist() == [_mix_in_python(value) for value in x.tolist()]
    assert _mix(torch.arange(1 << 16)).unique().numel() == 1 << 16  # a bijection


@pytest.mark.parametrize("key", [Key.of(0), Key.of(1).fold(5), Key.of(2).at(2**40)])
def test_uniform_in_mean_variance_and_bits(key: Key) -> None:
    u = uniform((1024, 1024), key).double()
    deviations = math.sqrt(u.numel())
    assert 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) * deviations < 5 * math.sqrt(1 / 12)
    assert abs(u.square().mean() - 1 / 3) * deviations < 5 * math.sqrt(4 / 45)
    bits = (u * 2**24).long()[..., None] >> torch.arange(24) & 1
    assert ((bits.double().mean((0, 1)) - 0.5).abs() * deviations < 5 * 0.5).all()


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (Key.of(0), Key.of(1)),
        (Key.of(0).fold(0), Key.of(0).fold(1)),
        (Key.of(0).fold(0).fold(1), Key.of(0).fold(1).fold(0)),
        (Key.of(0), Key.of(0).at(1)),
        (Key.of(0), Key.of(0).at(2**32)),
        (Key.of(7), Key.of(7).fold(0)),
    ],
)
def test_streams_are_uncorrelated(a: Key, b: Key) -> None:
    x, y = (uniform((512, 512), key).double() - 0.5 for key in (a, b))
    assert abs((x * y).mean()) * 512 < 5 / 12
    assert abs((x[:, 1:] * x[:, :-1]).mean()) * 512 < 5 / 12  # nor a value with its neighbours
    assert abs((x[1:] * x[:-1]).mean()) * 512 < 5 / 12


def test_numbers_given_as_tensors_name_the_same_stream() -> None:
    by_tensor = Key.of(torch.tensor(3)).fold(torch.tensor(4)).at(torch.tensor(5))
    expected = uniform((4, 4), Key.of(3).fold(4).at(5))
    assert torch.equal(uniform((4, 4), by_tensor), expected)


@pytest.mark.parametrize("format", STOCHASTIC, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_key_repeats_and_another_differs(format: BlockFormat, dtype: torch.dtype) -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    key = Key.of(0).fold(1)
    for dim in (0, 1):
        y = fake_quantize(x, format, dim, key=key)
        assert torch.equal(y, fake_quantize(x, format, dim, key=key))
        assert not torch.equal(y, fake_quantize(x, format, dim, key=Key.of(0).fold(2)))
        assert torch.equal(quantize(x, format, dim, key=key).dequantize(dtype), y)


@pytest.mark.parametrize("format", STOCHASTIC, ids=str)
def test_any_split_of_a_batch_draws_what_the_whole_draws(format: BlockFormat) -> None:
    x = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 8.0  # the same tensor scale in every part
    key = Key.of(0).fold(1).at(1000)
    whole = fake_quantize(x, format, 1, key=key)
    parts = [fake_quantize(x[i : i + 32], format, 1, key=key.at(1000 + i)) for i in (0, 32, 64)]
    assert torch.equal(torch.cat(parts), whole)
    if format.block_size != -1:  # blocks along rows, where the parts are whole blocks
        whole = fake_quantize(x, format, 0, key=key)
        parts = [fake_quantize(x[i : i + 32], format, 0, key=key.at(1000 + i)) for i in (0, 32, 64)]
        assert torch.equal(torch.cat(parts), whole)
    samples = fake_quantize(x.view(3, 32, 64), format, 2, key=key).view(96, 64)
    assert torch.equal(samples, fake_quantize(x, format, 1, key=key))


def test_which_formats_never_clip() -> None:
    """All E8M0 ones under rceil: the others' scales round to nearest."""
    assert [f.name for f in NEVER_CLIPPING] == [f.name for f in STOCHASTIC if f.scale_rule]


@pytest.mark.parametrize("format", NEVER_CLIPPING, ids=str)
def test_stochastic_rounding_is_unbiased(format: BlockFormat) -> None:
    """The error of the mean of B draws falls as 1/sqrt(B), where a bias would make it stop; and
    all draws together, outwards counted positive, leave no more than chance does.
    """
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    draws, total, squares, errors = 0, torch.zeros(8, 32, dtype=torch.float64), 0.0, {}
    while draws < 4096:  # rows are independent: 64 draws at a time
        y = fake_quantize(x.repeat(64, 1), format, key=Key.of(0).at(draws * 8))
        error = (y.double() - x.repeat(64, 1)).view(64, 8, 32)
        total, squares = total + error.sum(0), squares + float(error.square().sum())
        draws += 64
        errors[draws] = float((total / draws).norm())
    for n in (256, 1024, 4096):
        assert errors[n] == pytest.approx(errors[64] * math.sqrt(64 / n), rel=0.35), errors
    assert abs(float((total * x.sign()).sum())) < 4 * math.sqrt(squares)
    nearest = fake_quantize(x, replace(format, rounding=Rounding.NEAREST))
    assert errors[4096] < float((nearest - x).norm()) / 20  # where nearest stays for ever


@pytest.mark.parametrize("format", [MXINT8, MXFP8, NVFP4, NVINT4, INT8], ids=str)
def test_stochastic_results_are_the_two_neighbours(format: BlockFormat) -> None:
    """A value on the grid stays; others go to one of the grid's values around them."""
    format = replace(format, rounding=Rounding.STOCHASTIC)
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    x[0] = 0.0
    a = quantize(x, format, key=Key.of(0))
    nearest = quantize(x, replace(format, rounding=Rounding.NEAREST))
    assert torch.equal(a.scale, nearest.scale)
    values, near = a.dequantize(), nearest.dequantize()
    between = (values - x) * (near - x) <= 0  # on the other side
    assert ((values == near) | between).all()
    assert (values != near).float().mean() > 0.1
    if format.scale_rule:
        assert torch.equal(fake_quantize(near, format, key=Key.of(1)), near)


def test_the_symmetric_range_binds_stochastically_too() -> None:
    format = replace(MXINT8, scale_rule=ScaleRule.FLOOR, rounding=Rounding.STOCHASTIC)
    x = torch.full((64, 32), -127.75)
    assert fake_quantize(x, format, key=Key.of(0)).unique().tolist() == [-127.0]


def test_randomness_moves_with_step_and_row_only() -> None:
    randomness = Randomness(seed=5)
    randomness.set(3, torch.tensor(64))
    key = randomness.key(2)
    expected = uniform((4, 4), Key.of(5).fold(3).fold(2).at(64))
    assert torch.equal(uniform((4, 4), key), expected)
    randomness.set(4, 0)
    assert torch.equal(uniform((4, 4), key), expected)  # a key once given does not change
    assert not torch.equal(uniform((4, 4), randomness.key(2)), expected)
