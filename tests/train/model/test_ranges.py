"""Values out of range are refused when they are read."""

import math
from typing import Any

import pytest
from transformers import LlamaConfig

from train.model.initial import empty_model
from train.model.step import Optimization

INF, NAN = math.inf, math.nan
BAD: dict[str, list[Any]] = {
    "lr": [-1.0, INF, NAN],
    "betas": [(0.9, 1.0), (-0.1, 0.9), (NAN, 0.9)],
    "weight_decay": [-0.1, INF, NAN],
    "warmup_steps": [-5],
    "min_lr_ratio": [7.0, -0.1, NAN],
    "max_grad_norm": [0.0, -1.0, NAN],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_an_optimization_out_of_range_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"model\.optimization\.{name}="):
        Optimization(**{name: value})


def test_the_ends_of_the_ranges_are_in_them() -> None:
    Optimization(lr=0.0, warmup_steps=0, min_lr_ratio=0.0, max_grad_norm=INF, weight_decay=0.0)
    Optimization(lr=1e38, betas=(0.0, 0.0), min_lr_ratio=1.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_dropout", 1.5), ("attention_dropout", NAN), ("rms_norm_eps", -1.0),
        ("rms_norm_eps", NAN), ("max_position_embeddings", 0),
    ],
)  # fmt: skip
def test_an_architecture_that_cannot_run_is_refused(name: str, value: Any) -> None:
    config = LlamaConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
    setattr(config, name, value)
    with pytest.raises(ValueError, match=rf"model\.llama\.{name}="):
        empty_model(config)
