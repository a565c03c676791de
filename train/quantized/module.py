"""Quantized models as modules that compute what an engine is to compute."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lowbit.definition.blocks import from_blocks, to_blocks
from train.quantized.model import QuantizedModel
from train.quantized.on_meta import parameters_on_meta


def as_module(
    model: QuantizedModel, dtype: torch.dtype = torch.bfloat16, *, exported: bool = True
) -> nn.Module:
    """A transformers model in eval mode: decoded weights in `dtype`, behind transforms and
    activation formats. `exported`: all other tensors are rounded to BF16 first, as engines have
    them; else they are what they were.
    """
    state = {
        name: (tensor.bfloat16() if exported else tensor).to(dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in model.others.items()
    }
    module = empty(model.config, dtype)
    for name, layer in model.layers.items():
        parent, _, child = name.rpartition(".")
        made = layer.module(state.pop(f"{name}.bias", None), dtype)
        setattr(module.get_submodule(parent), child, made)
    return filled(module, state)


def empty(config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """A model of this configuration, its parameters on the meta device."""
    plain = {k: v for k, v in copy.deepcopy(dict(config)).items() if k != "quantization_config"}
    with parameters_on_meta():
        make: Any = AutoModelForCausalLM.from_config
        model: nn.Module = make(AutoConfig.for_model(**plain), dtype=dtype)
    return model


def filled(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """`model` with these tensors, in eval mode; ValueError for one too few or too many."""
    unknown = model.load_state_dict(dict(state), strict=False, assign=True).unexpected_keys
    model.tie_weights()  # type: ignore[operator]  # transformers'
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if unknown or missing:
        raise ValueError(f"tensors missing: {missing[:3]}, without a place: {unknown[:3]}")
    return model.eval()


def before(layer: nn.Module, matrix: Tensor) -> None:
    """Have what enters `layer` multiplied by `matrix` in blocks."""

    def prepared(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (turned(inputs[0], matrix).to(inputs[0].dtype), *inputs[1:])

    layer.register_forward_pre_hook(prepared)


def turned(x: Tensor, matrix: Tensor) -> Tensor:
    """`x` times `matrix` in FP32, on each run of its size along the last axis."""
    blocks, inside = to_blocks(x.float(), len(matrix), -1)
    return from_blocks(blocks @ matrix.to(x.device), inside, tuple(x.shape))
