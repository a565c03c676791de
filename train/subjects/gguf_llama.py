"""Llama models and their tokenizers out of GGUF files."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from data.plain import as_type
from data.vocabulary import Vocabulary
from train.subjects.gguf import GGUF

_CONTROL = 3  # token type of what no text spells
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def llama_of(file: GGUF) -> LlamaForCausalLM:
    """The model, FP32; ValueError for another architecture or what is not plain Llama."""
    config = _config(file)
    places = {name: _place(file, name) for name in file}
    _check_shapes(file, config, places)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or 0
    state = {}
    for name, place in places.items():
        tensor = file.tensor(name)
        if ".attn_q." in name or ".attn_k." in name:
            tensor = _unpermuted(tensor, heads if ".attn_q." in name else kv_heads)
        state[place] = tensor
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    model.train(False)
    return model


def _place(file: GGUF, name: str) -> str:
    """The tensor's name in transformers."""
    stem, _, suffix = name.rpartition(".")
    block, _, part = stem.removeprefix("blk.").partition(".")
    known = _WHOLE.get(stem) or (part in _LAYER and f"model.layers.{block}.{_LAYER[part]}")
    if not known or suffix != "weight":
        raise ValueError(f"{file.source}: tensor {name[:40]} has no place in a plain Llama model")
    return f"{known}.weight"


def _check_shapes(file: GGUF, config: LlamaConfig, places: Mapping[str, str]) -> None:
    """ValueError unless the file holds the tensors of such a model; before there is one."""
    if config.num_hidden_layers > len(places):
        raise ValueError(f"{file.source} lacks tensors of its {config.num_hidden_layers} layers")
    with torch.device("meta"):
        parts = dict(LlamaForCausalLM(config).named_parameters())
    expected = {name: tuple(part.shape) for name, part in parts.items()}
    found = {place: file.shape(name) for name, place in places.items()}
    if wrong := sorted(n for n in {*expected, *found} if expected.get(n) != found.get(n)):
        here, there = (shapes.get(wrong[0]) for shapes in (found, expected))
        raise ValueError(f"{file.source}: {wrong[0]} is {here}, expected {there}")


_WORDS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
}


def _config(file: GGUF) -> LlamaConfig:
    get: Any = file.metadata.get
    if get("general.architecture") != "llama":
        raise ValueError(
            f"{file.source}: architecture {get('general.architecture')!r}, expected 'llama'"
        )
    if get("llama.rope.scaling.type", "none") != "none":
        raise ValueError(f"{file.source}: scaled rotary embeddings cannot be read")
    sizes = {word: _number(file, key, int) for word, key in _WORDS.items()}
    tokens = get("tokenizer.ggml.tokens")
    heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    if heads % kv_heads or sizes["hidden_size"] % (2 * heads):
        raise ValueError(f"{file.source}: heads do not divide its width: {sizes}")
    theta: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    if "llama.rope.freq_base" in file.metadata:
        theta["rope_theta"] = _number(file, "rope.freq_base", float)
    return LlamaConfig(
        **sizes,
        vocab_size=len(tokens) if tokens else _number(file, "vocab_size", int),
        rms_norm_eps=_number(file, "attention.layer_norm_rms_epsilon", float),
        rope_parameters=theta,
        tie_word_embeddings="output.weight" not in file,
        use_cache=False,
    )


def _number(file: GGUF, key: str, kind: type) -> Any:
    """Of the metadata, positive; there may be fewer heads of keys and values, where it says so."""
    if key == "attention.head_count_kv" and f"llama.{key}" not in file.metadata:
        key = "attention.head_count"
    value: Any = file.metadata.get(f"llama.{key}")
    if type(value) not in {kind, int} or not 0 < value < (2**31 if kind is int else math.inf):
        shown = f"{str(value)[:60]!r}, expected a positive {kind.__name__}"
        raise ValueError(f"{file.source}: llama.{key} is {shown}")
    return value


def _unpermuted(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp stores the two halves of each head's rotary pairs interleaved."""
    rows, columns = weight.shape
    split = weight.view(heads, rows // heads // 2, 2, columns)
    return split.transpose(1, 2).reshape(rows, columns)


def vocabulary_of(file: GGUF) -> Vocabulary:
    """The byte-level BPE inside; ValueError for any other kind of tokenizer."""
    meta = file.metadata
    kind, split = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    if kind != "gpt2" or split not in ("smollm", "gpt-2"):
        raise ValueError(
            f"{file.source}: its tokenizer ({kind}, {split}) cannot be rebuilt: give --tokenizer"
        )
    tokens, merges, kinds, end = (_token_values(file, key) for key in _TOKEN_KEYS)
    pairs: Any = [tuple(merge.split(" ", 1)) for merge in merges]
    try:
        tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file.source}: its tokenizer cannot be rebuilt: {error}") from None
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if split == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    else:
        tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [token for token, kind in zip(tokens, kinds, strict=False) if kind == _CONTROL]
    )
    if end not in range(len(tokens)):
        raise ValueError(f"{file.source}: its end of document is token {end} of {len(tokens)}")
    return Vocabulary(tokenizer.to_str(), end)


_TOKEN_KEYS: dict[str, Any] = {
    "tokens": list[str],
    "merges": list[str],
    "token_type": list[int],
    "eos_token_id": int,
}


def _token_values(file: GGUF, key: str) -> Any:
    value = file.metadata.get(f"tokenizer.ggml.{key}", [] if key == "token_type" else None)
    return as_type(_TOKEN_KEYS[key], value, f"{file.source}: tokenizer.ggml.{key}")
