"""Fields of a Llama configuration that transformers takes without a look at them."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def check_architecture(llama: Mapping[str, Any]) -> None:
    """What transformers divides by, or looks up, without a look at it."""
    fields = llama.get("init_args", llama)
    for name in (*_SIZES, "vocab_size"):
        value = fields.get(name)
        if isinstance(value, int) and value < 1:
            raise ValueError(f"model.llama.{name}={value}: expected at least 1")
    rope = (fields.get("rope_parameters") or {}).get("rope_type", "default")
    known = ("default", *ROPE_INIT_FUNCTIONS)
    for key, value, names in (
        ("hidden_act", fields.get("hidden_act"), tuple(ACT2FN)),
        ("rope_parameters.rope_type", rope, known),
    ):
        if value is not None and value not in names:
            close = get_close_matches(str(value), names, 6, 0.0)
            raise ValueError(f"model.llama.{key}={value}: unknown; known are {', '.join(close)}")


def check_positions(seq_len: int, positions: int) -> None:
    """ValueError for windows longer than the model was made for."""
    if seq_len > positions:
        raise ValueError(
            f"data.seq_len={seq_len} exceeds model.llama.max_position_embeddings={positions}"
        )
