"""Uses of a quantized layer that have no right result, each with what to do instead."""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

_PLAIN = "or compute it within lowbit.unquantized(model)"


def check_input(layer: nn.Linear, input: Any) -> None:
    """ValueError for what `nn.Linear` would not take either, RuntimeError for transforms."""
    if isinstance(input, fx.Proxy):
        raise RuntimeError(
            "fx cannot trace into a QuantLinear: make it a leaf (Tracer.is_leaf_module), "
            "or use torch.export"
        )
    if not isinstance(input, Tensor):
        raise ValueError(f"a quantized layer takes a tensor, not {type(input).__name__}")
    if input.is_nested:
        raise ValueError("a quantized layer takes no nested tensor: pad it (to_padded_tensor)")
    if input.layout is not torch.strided:
        raise ValueError(f"a quantized layer takes no {input.layout} tensor: use to_dense()")
    if not input.dim() or input.shape[-1] != layer.in_features:
        raise ValueError(f"input {tuple(input.shape)}: expected [..., {layer.in_features}]")
    if not torch.compiler.is_compiling():
        _check_transforms(input)


def check_dtypes(input: Tensor, weight: Tensor) -> None:
    """ValueError where autocast leaves two dtypes, for which `nn.Linear` has no product."""
    if input.dtype is not weight.dtype:
        raise ValueError(f"input is {input.dtype} and weight {weight.dtype}: cast one to the other")


def _check_transforms(input: Tensor) -> None:
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]  # torch's
        raise RuntimeError("torch.jit.trace fixes what a quantized layer decides: use torch.export")
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "a quantized layer has no torch.func transforms (grad, vmap, jvp, ...): use "
            f"torch.autograd, with create_graph=True for a second gradient, {_PLAIN}"
        )
    if forward_ad._current_level < 0:
        return
    if forward_ad.unpack_dual(input).tangent is not None:  # type: ignore[no-untyped-call]  # torch's
        raise RuntimeError(
            f"a quantized layer has no forward-mode derivative: use backward(), {_PLAIN}"
        )
