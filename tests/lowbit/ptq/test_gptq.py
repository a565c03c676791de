"""GPTQ against a reference in FP64 that inverts what is left of H anew for every column."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit import BlockFormat, Scales, block_format, quantize
from lowbit.definition.codes import decode
from lowbit.ptq import Observer, Order, Search, Solver, gptq, observe, shifted_target
from lowbit.ptq.gptq import MOST_DAMPING, relative_error

FOUR_BITS = ("mxfp4", "nvfp4", "mxint4", "nvint4")
GENERATOR = torch.Generator()


def _correlated(seed: int, rows: int = 24, width: int = 96) -> tuple[Tensor, Tensor]:
    """A weight, and XᵀX of inputs that a few directions dominate."""
    g = GENERATOR.manual_seed(seed)
    mix = torch.randn(width // 8, width, generator=g)
    x = torch.randn(400, width // 8, generator=g) @ mix + 0.3 * torch.randn(400, width, generator=g)
    return torch.randn(rows, width, generator=g), (x.T @ x).double()


def _own(weight: Tensor, format: BlockFormat) -> Scales:
    return observe(weight, format, Observer())


def _one_column_at_a_time(
    weight: Tensor, hessian: Tensor, format: BlockFormat, scales: Scales, order: Tensor, damp: float
) -> Tensor:
    """Optimal brain surgeon: round one column, move its error onto the rest by the inverse of what
    is left of H. Elements are found among all that the format has, by distance.
    """
    h = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian))
    grid = torch.tensor(sorted({value + 0.0 for value in format.element.values})).double()
    step = scales.product.double().repeat_interleave(format.block_size, 1)
    w, left = weight.double().clone(), order.tolist()
    codes = torch.empty_like(w)
    while left:
        j = left[0]
        inverse = torch.linalg.inv(h[left][:, left])
        scaled = w[:, j].float().double() / step[:, j]
        codes[:, j] = grid[(scaled[:, None] - grid).abs().argmin(1)]
        error = (w[:, j] - codes[:, j] * step[:, j]) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return codes


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("name", FOUR_BITS)
def test_equals_one_column_at_a_time_in_fp64(name: str, order: Order) -> None:
    format = block_format(name)
    weight, hessian = _correlated(1)
    scales = observe(weight, format, Observer(Search.AFTER), hessian.diagonal())
    found = gptq(weight, hessian, format, scales, Solver(order, columns=32)).weight
    places = torch.arange(len(hessian))
    if order is Order.ACTIVATION:
        places = hessian.diagonal().argsort(descending=True, stable=True)
    expected = _one_column_at_a_time(weight, hessian, format, scales, places, 0.01)
    assert torch.equal(decode(found.codes, format.element).double(), expected)


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("name", (*FOUR_BITS, "mxint8", "mxfp8", "mxfp6", "nvint8", "int8"))
def test_an_identity_hessian_is_rounding_to_nearest(name: str, order: Order) -> None:
    format = block_format(name)
    weight, _ = _correlated(2)
    rtn = quantize(weight, format)
    found = gptq(weight, torch.eye(96), format, _own(weight, format), Solver(order)).weight
    assert torch.equal(found.codes, rtn.codes) and torch.equal(found.scale, rtn.scale)
    assert (found.tensor_scale is None) == (rtn.tensor_scale is None)


@pytest.mark.parametrize("name", FOUR_BITS)
def test_updates_may_wait_for_any_number_of_columns(name: str) -> None:
    format = block_format(name)
    weight, hessian = _correlated(3, width=160)
    scales = _own(weight, format)
    found = [
        gptq(weight, hessian, format, scales, Solver(columns=n)).weight.codes
        for n in (32, 128, 160, 1000)
    ]
    assert all(torch.equal(codes, found[0]) for codes in found[1:])


@pytest.mark.parametrize("seed", range(30))
def test_the_error_is_below_that_of_rounding(seed: int) -> None:
    format = block_format(FOUR_BITS[seed % 4])
    weight, hessian = _correlated(seed)
    rtn = relative_error(weight, quantize(weight, format).dequantize(), hessian)
    for order in Order:
        solved = gptq(weight, hessian, format, _own(weight, format), Solver(order))
        assert relative_error(weight, solved.weight.dequantize(), hessian) < 0.5 * rtn
        assert solved.damping == 0.01


@pytest.mark.parametrize("order", Order)
def test_a_hessian_of_rank_8_with_dead_inputs(order: Order) -> None:
    format = block_format("nvfp4")
    g = GENERATOR.manual_seed(7)
    weight = torch.randn(24, 96, generator=g)
    weight[:, 50] = 0  # a dead weight
    x = torch.randn(8, 96, generator=g)
    dead = [3, 4, 40, 95]
    x[:, dead] = 0
    hessian, rtn = (x.T @ x).double(), quantize(weight, format)
    found = gptq(weight, hessian, format, _own(weight, format), Solver(order)).weight
    assert torch.equal(found.codes[:, dead], rtn.codes[:, dead])
    error = relative_error(weight, found.dequantize(), hessian)
    assert error < 0.2 * relative_error(weight, rtn.dequantize(), hessian)
    alive = [j for j in range(96) if j not in dead]
    places = torch.tensor(alive)
    if order is Order.ACTIVATION:
        places = hessian.diagonal().argsort(descending=True, stable=True)[: len(alive)]
    expected = _one_column_at_a_time(weight, hessian, format, _own(weight, format), places, 0.01)
    codes = decode(found.codes, format.element).double()
    assert torch.equal(codes[:, alive], expected[:, alive])


def test_damping_is_raised_where_it_must_be_and_reported() -> None:
    format = block_format("mxfp4")
    weight, hessian = _correlated(4)
    x = torch.randn(4, 96)
    singular = (x.T @ x).double()
    found = gptq(weight, singular, format, _own(weight, format), Solver(damping=0.0))
    assert found.damping > 0
    indefinite = hessian - 0.2 * hessian.diagonal().mean() * torch.eye(96)
    assert gptq(weight, indefinite, format, _own(weight, format), Solver()).damping > 0.01
    nonsense = -hessian
    nonsense.diagonal().abs_()
    nonsense -= 40 * hessian.diagonal().mean() * torch.ones(96, 96)
    with pytest.raises(ValueError, match=f"damping {MOST_DAMPING:g} does not help"):
        gptq(weight, nonsense, format, _own(weight, format), Solver())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_is_refused(bad: float) -> None:
    weight, hessian = _correlated(5)
    hessian[3, 4] = bad
    with pytest.raises(ValueError, match="not finite"):
        gptq(weight, hessian, block_format("mxfp4"), _own(weight, block_format("mxfp4")), Solver())


def test_the_shifted_target_is_the_least_squares_solution() -> None:
    g = GENERATOR.manual_seed(8)
    weight = torch.randn(5, 32, generator=g)
    x = torch.randn(200, 32, generator=g).double()
    full = x + 0.1 * torch.randn(200, 32, generator=g)
    solution = torch.linalg.lstsq(x, full @ weight.double().T).solution.T
    found = shifted_target(weight, x.T @ x, (full - x).T @ x, 1.0, 0.0)
    assert torch.allclose(found.double(), solution, atol=1e-6)
    half = shifted_target(weight, x.T @ x, (full - x).T @ x, 0.5, 0.0)
    assert torch.allclose(half, (found + weight) / 2, atol=1e-6)
    with pytest.raises(ValueError, match=r"alpha=1.5 is not in 0 .. 1"):
        shifted_target(weight, x.T @ x, x.T @ x, 1.5, 0.0)


@pytest.mark.parametrize("changes", [{"damping": -1.0}, {"damping": 11.0}, {"columns": 0}])
def test_a_solver_that_cannot_be_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))}="):
        replace(Solver(), **changes)
