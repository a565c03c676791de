"""GPTQ: codes column by column, each column's error moved onto those that follow.

    minimise tr(D H Dᵀ), D = Ŵ - W [out, in], H = XᵀX [in, in] of the inputs X

With H⁻¹ = Uᵀ U, U upper triangular, rounding column j and adding -(w_j - q_j) / U_jj U_j,: to the
columns after it is the best that these can do (Frantar et al., 2210.17323). Scales are chosen
before and stay (static groups): a column takes those of its block wherever the order puts it, so
that an order leaves no trace in what is stored. All of it in FP64.
"""

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from lowbit.definition.blocks import from_blocks, to_blocks
from lowbit.definition.given import Scales
from lowbit.definition.rounding import round_to_element_
from lowbit.formats import BlockFormat, Rounding
from lowbit.quantize import QuantizedTensor, quantize

MOST_DAMPING = 10.0  # of the mean diagonal: beyond, H has no say


class Order(Enum):
    """Of columns."""

    DEFAULT = "default"  #: as they lie
    ACTIVATION = "activation"  #: by descending H_jj: inputs that matter most first


@dataclass(frozen=True)
class Solver:
    """How GPTQ goes about it."""

    order: Order = Order.ACTIVATION
    damping: float = 0.01  #: of the mean of H's diagonal, added to it; raised where that is too few
    columns: int = 128  #: whose updates of the rest wait for each other: speed alone

    def __post_init__(self) -> None:
        if not 0 <= self.damping <= MOST_DAMPING or self.columns < 1:
            raise ValueError(
                f"damping={self.damping}, columns={self.columns}: 0 to {MOST_DAMPING:g}, at least 1"
            )


@dataclass(frozen=True)
class Solved:
    """Codes that GPTQ found."""

    weight: QuantizedTensor
    damping: float  #: that it took: above the solver's where H could not be factorised


def gptq(
    weight: Tensor, hessian: Tensor, format: BlockFormat, scales: Scales, solver: Solver
) -> Solved:
    """Codes of `weight` [out, in] under `scales` that keep tr(D H Dᵀ) low.

    Inputs that are always zero (H_jj = 0) are rounded to nearest. ValueError for an H that is not
    finite or that no damping makes positive definite.
    """
    if format.rounding is Rounding.STOCHASTIC:
        raise ValueError(f"{format}: GPTQ rounds to nearest")
    diagonal = hessian.diagonal().double()
    if solver.order is Order.ACTIVATION:
        order = diagonal.argsort(descending=True, stable=True)
    else:
        order = torch.arange(len(diagonal), device=weight.device)
    u, damping = _factor(hessian.double()[order][:, order], solver.damping)
    step = _expanded(scales.product, format, weight.shape)
    columns, steps = weight.double().T[order], step.T[order].contiguous()
    chosen = _columns(columns, steps, u, format, solver.columns)
    back = torch.empty_like(chosen)
    back[order] = chosen
    return Solved(quantize(back.T.contiguous(), format, scales=scales), damping)


def shifted_target(
    weight: Tensor, hessian: Tensor, cross: Tensor, alpha: float, damping: float
) -> Tensor:
    """W + alpha W (dXᵀ X) H⁻¹, FP32: what on the inputs X comes nearest to W on X + dX, for alpha 1
    (GPTAQ, 2504.02692). `cross` is dXᵀ X [in, in].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} is not in 0 .. 1")
    if alpha == 0:
        return weight
    u, _ = _factor(hessian.double(), damping)
    return (weight.double() + alpha * (weight.double() @ cross.double() @ u.T) @ u).float()


def relative_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """tr(D H Dᵀ) / tr(W H Wᵀ); 0 where both are."""
    d, w, h = (quantized - weight).double(), weight.double(), hessian.double()
    error, size = float(((d @ h) * d).sum()), float(((w @ h) * w).sum())
    return error / size if size else 0.0


def _columns(columns: Tensor, steps: Tensor, u: Tensor, format: BlockFormat, per: int) -> Tensor:
    """Values [in, out] under their steps, of columns [in, out] in this order."""
    chosen = torch.empty_like(steps)
    for start in range(0, len(columns), per):
        here = slice(start, start + per)
        block, errors = columns[here].clone(), torch.empty_like(columns[here])
        for j in range(len(block)):
            value = _rounded(block[j].float(), steps[start + j], format)
            chosen[start + j] = value
            errors[j] = (block[j] - value) / u[start + j, start + j]
            block[j + 1 :].addr_(
                u[start + j, start + j + 1 : start + len(block)], errors[j], alpha=-1
            )
        columns[start + per :] -= u[here, start + per :].T @ errors
    return chosen


def _rounded(x: Tensor, step: Tensor, format: BlockFormat) -> Tensor:
    codes = round_to_element_(x / step, format.element, format.rounding)
    return codes.clamp_(format.element.min, format.element.max).mul_(step)


def _expanded(product: Tensor, format: BlockFormat, shape: tuple[int, ...]) -> Tensor:
    """One scale per value."""
    blocks, inside = to_blocks(product.new_zeros(shape), format.block_size, -1)
    for axis in inside:
        product = product.unsqueeze(axis)
    return from_blocks(product.expand(blocks.shape), inside, shape)


def _factor(h: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper triangular U with Uᵀ U = (H + damping mean(diag H) I)⁻¹, and the damping it took.

    Of H turned about both axes, the lower factor is, turned back, an upper R with R Rᵀ = H: one
    factorization and a triangular inverse, where forming H⁻¹ would take its condition twice.
    """
    if not bool(h.isfinite().all()):
        raise ValueError("the Hessian is not finite: an input of the layer was NaN or infinite")
    mean = float(h.diagonal().mean()) or 1.0
    dead = h.diagonal() == 0
    taken = damping
    while taken <= MOST_DAMPING:
        damped = h.clone()
        damped.diagonal().add_(taken * mean).masked_fill_(dead, mean)
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        smallest = lower.diagonal().min() / lower.diagonal().max()
        if not int(info) and float(smallest) > math.sqrt(torch.finfo(h.dtype).eps):
            eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
            upper: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
            return upper, taken
        taken = max(taken * 10, 1e-6)
    raise ValueError(
        f"the Hessian is not positive semidefinite: damping {MOST_DAMPING:g} does not help"
    )
