"""Tiny decoders of bytes on disk, a text, and the verb in this process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

KINDS = {"llama": LlamaConfig, "qwen3": Qwen3Config, "mistral": MistralConfig}


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """A folder with a model of random weights, larger than the usual so that its logits differ."""

    def make(kind: str = "llama", **changes: Any) -> Path:
        torch.manual_seed(0)
        sizes = {
            "vocab_size": 257, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "max_position_embeddings": 128, "initializer_range": 0.2, "bos_token_id": None,
            "eos_token_id": None, "pad_token_id": None,
        }  # fmt: skip
        folder = tmp_path / kind
        AutoModelForCausalLM.from_config(KINDS[kind](**sizes | changes)).save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i * i} is the square of {i}.\n" for i in range(400)))
    return path


@pytest.fixture
def quantize(text: Path) -> Callable[..., int]:
    """`lowbit quantize` on 4 windows of the text; the text is left out for `calibrated=False`."""

    def run(model: Path, out: Path, *flags: str, calibrated: bool = True) -> int:
        from train.cli import main

        where = ["--text", str(text), "--tokenizer", "bytes", "--windows", "4", "--seq-len", "48"]
        return main(["quantize", str(model), str(out), *(where if calibrated else []), *flags])

    return run
