"""A tiny Llama, its layers rounded to nearest in memory, and folders of exports."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lowbit import BlockFormat, quantize
from lowbit.definition.transforms import Transform, transformed
from train.export.folder import seal, staging
from train.export.layouts import LAYOUTS, check_holds, write_model
from train.quantized.layout import StoredLayer
from train.quantized.model import QuantizedModel, linear_names, plain_config


@pytest.fixture(scope="session")
def tiny_llama() -> LlamaForCausalLM:
    """Untied, with grouped queries, and larger weights than the usual so that its logits differ."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=128, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


Quantized = Callable[..., QuantizedModel]


@pytest.fixture(scope="session")
def quantized(tiny_llama: LlamaForCausalLM) -> Quantized:
    """By the format of each layer's name, or one for all; activations, transform."""

    def make(
        format: str | BlockFormat | Callable[[str], str],
        activations: BlockFormat | None = None,
        transform: Transform | None = None,
    ) -> QuantizedModel:
        state, layers = dict(tiny_llama.state_dict()), {}
        for name in linear_names(tiny_llama):
            if name != "lm_head":
                weight = state.pop(f"{name}.weight")
                if transform:
                    weight = transformed(weight, transform, inverse_transpose=True)
                own = format(name) if callable(format) else format
                layers[name] = StoredLayer(quantize(weight, own), activations, transform)
        return QuantizedModel("tiny", plain_config(tiny_llama), layers, state)

    return make


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., Path]:
    """Write a model in a layout; its folder."""

    def write(model: QuantizedModel, layout: str, *, pseudo: bool = False) -> Path:
        target = tmp_path / f"{layout}-{len(list(tmp_path.iterdir()))}"
        check_holds(model, LAYOUTS[layout])
        with staging(target) as place:
            digests, _ = write_model(model, LAYOUTS[layout], place, pseudo=pseudo)
            seal(place, digests, {"layout": layout})
            place.rename(target)
        return target

    return write


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    return torch.randint(257, (2, 33), generator=torch.Generator().manual_seed(1))
