"""The layers of a group quantized as one: their weights stacked, under one tensor scale."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit import QuantizedTensor, quantize, transformed
from lowbit.ptq import gptq, observe, shifted_target
from lowbit.ptq.gptq import relative_error
from train.ptq.request import Method
from train.ptq.streams import Group, Moments
from train.quantized.layout import StoredLayer
from train.quantized.reciprocal import divisible, is_nvfp4


@dataclass(frozen=True)
class Found:
    """A layer as it will be stored, and what that cost."""

    layer: StoredLayer
    error: float  #: tr(D H Dᵀ) / tr(W H Wᵀ), H the identity where nothing was calibrated
    damping: float | None  #: that GPTQ took
    input_amax: float | None  #: largest magnitude that the calibration saw


def solve(
    group: Group, weights: Mapping[str, Tensor], method: Method, moments: Moments | None
) -> dict[str, Found]:
    """Each layer of the group, from its weight [out, in]; ValueError that names them."""
    try:
        return _solve(group, weights, method, moments)
    except ValueError as error:
        names = group[0] if len(group) == 1 else f"{group[0]} and {len(group) - 1} beside it"
        raise ValueError(f"layer {names}: {error}") from None


def _solve(
    group: Group, weights: Mapping[str, Tensor], method: Method, moments: Moments | None
) -> dict[str, Found]:
    weight = torch.cat([weights[name].float() for name in group])
    if not bool(weight.isfinite().all()):
        raise ValueError("its weights are not finite")
    turned = method.turning()
    if turned:
        weight = transformed(weight, turned, inverse_transpose=True)
    solver, damping, target = method.solver(), None, weight
    hessian = None if moments is None else moments.hessian
    if method.alpha and moments is not None and moments.cross is not None:
        target = shifted_target(
            weight, moments.hessian, moments.cross, method.alpha, solver.damping
        )
    importance = hessian.diagonal() if hessian is not None and method.is_weighted else None
    scales = observe(target, method.format, method.scales(), importance)
    if is_nvfp4(method.format) and scales.tensor is not None:
        scales = replace(scales, tensor=divisible(scales.tensor))
    if method.method == "gptq":
        assert hessian is not None
        solved = gptq(target, hessian, method.format, scales, solver)
        whole, damping = solved.weight, solved.damping
    else:
        whole = quantize(target, method.format, scales=scales)
    parts = _split(whole, [len(weights[name]) for name in group])
    pieces = torch.split(weight, [len(weights[name]) for name in group])
    return {
        name: Found(
            StoredLayer(part, method.activations, turned),
            _error(piece, part.dequantize(), hessian),
            damping,
            None if moments is None else moments.amax,
        )
        for name, part, piece in zip(group, parts, pieces, strict=True)
    }


def _error(weight: Tensor, quantized: Tensor, hessian: Tensor | None) -> float:
    if hessian is not None:
        return relative_error(weight, quantized, hessian)
    size = float(weight.square().sum(dtype=torch.float64))
    return float((quantized - weight).square_().sum(dtype=torch.float64)) / size if size else 0.0


def _split(whole: QuantizedTensor, rows: list[int]) -> list[QuantizedTensor]:
    codes: tuple[Tensor, ...] = torch.split(whole.codes, rows)
    scales: tuple[Tensor, ...] = torch.split(whole.scale, rows)
    return [replace(whole, codes=c, scale=s) for c, s in zip(codes, scales, strict=True)]
