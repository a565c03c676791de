"""Llama models and their tokenizers out of GGUF files (v2 and v3), dequantised to FP32."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from data.vocabulary import Vocabulary

_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
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


class _Reader:
    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        self.at += length
        return bytes(self.data[self.at - length : self.at]).decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, length = self.scalar("I"), self.scalar("Q")
            return [self.value(inner) for _ in range(length)]
        return self.scalar(_SCALARS[kind])


class GGUF:
    """The metadata and the tensors of one file."""

    def __init__(self, data: bytes | memoryview, source: str) -> None:
        self.source = source
        reader = _Reader(memoryview(data))
        if bytes(reader.data[:4]) != b"GGUF":
            raise ValueError(f"{source} is not a GGUF file")
        reader.at = 4
        try:
            version, tensors, entries = (reader.scalar(code) for code in "IQQ")
            if version not in (2, 3):
                raise ValueError(f"{source}: GGUF version {version}, expected 2 or 3")
            self.metadata = {
                reader.string(): reader.value(reader.scalar("I")) for _ in range(entries)
            }
            self._infos = dict(self._info(reader) for _ in range(tensors))
        except (struct.error, KeyError, UnicodeDecodeError) as error:
            raise ValueError(f"{source} is a damaged GGUF file: {error}") from None
        alignment = self.metadata.get("general.alignment", 32)
        self._data = reader.data[reader.at + -reader.at % alignment :]

    @staticmethod
    def _info(reader: _Reader) -> tuple[str, tuple[tuple[int, ...], int, int]]:
        name, dims = reader.string(), reader.scalar("I")
        shape = tuple(reader.scalar("Q") for _ in range(dims))[::-1]
        return name, (shape, reader.scalar("I"), reader.scalar("Q"))

    @property
    def types(self) -> str:
        """How the tensors are stored, for a person: `210 x Q4_1, 61 x F32`."""
        stored = [kind for _, kind, _ in self._infos.values()]
        names = {kind: _TYPES[kind][0] if kind in _TYPES else f"type {kind}" for kind in stored}
        return ", ".join(f"{stored.count(kind)} x {name}" for kind, name in sorted(names.items()))

    def tensor(self, name: str) -> Tensor:
        """FP32 values."""
        shape, kind, offset = self._infos[name]
        if kind not in _TYPES:
            raise ValueError(
                f"{self.source}: {name} is stored as GGML type {kind}, readable are "
                f"{', '.join(known for known, _, _ in _TYPES.values())}"
            )
        _, size, per_block = _TYPES[kind]
        count = int(np.prod(shape)) // per_block
        raw = np.frombuffer(self._data, np.uint8, count * size, offset).reshape(count, size)
        return torch.from_numpy(_decoded(kind, raw).reshape(shape).copy())

    def __iter__(self) -> Any:
        return iter(self._infos)


# GGML type -> name, bytes of a block, values of a block
_TYPES = {0: ("F32", 4, 1), 1: ("F16", 2, 1), 30: ("BF16", 2, 1)} | {
    2: ("Q4_0", 18, 32),
    3: ("Q4_1", 20, 32),
    8: ("Q8_0", 34, 32),
    39: ("MXFP4", 17, 32),
}
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def _decoded(kind: int, raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[blocks, values] from [blocks, bytes]."""
    name = _TYPES[kind][0]
    if name in ("F32", "F16"):
        return raw.view(np.float32 if name == "F32" else np.float16).astype(np.float32)
    if name == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    codes = raw[:, -16:]
    nibbles = np.concatenate([codes & 15, codes >> 4], 1)
    if name == "MXFP4":
        scaled: NDArray[np.float32] = np.ldexp(
            np.concatenate([_E2M1, -_E2M1])[nibbles], raw[:, :1].astype(np.int32) - 127
        )
        return scaled
    scale = np.ascontiguousarray(raw[:, :2]).view(np.float16).astype(np.float32)
    if name == "Q8_0":
        return scale * raw[:, 2:].view(np.int8)
    both = nibbles.astype(np.float32)
    if name == "Q4_0":
        return scale * (both - 8)
    return scale * both + np.ascontiguousarray(raw[:, 2:4]).view(np.float16).astype(np.float32)


def read_gguf(path: Path) -> GGUF:
    """The file's metadata and tensors."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    return GGUF(memoryview(np.memmap(path, mode="r")), str(path))  # type: ignore[arg-type]


def llama_of(file: GGUF) -> LlamaForCausalLM:
    """The model, FP32; ValueError for another architecture or what is not plain Llama."""
    config = _config(file)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    state = {}
    for name in file:
        stem, _, suffix = name.rpartition(".")
        block, _, part = stem.removeprefix("blk.").partition(".")
        known = _WHOLE.get(stem) or (part in _LAYER and f"model.layers.{block}.{_LAYER[part]}")
        if not known or suffix != "weight":
            raise ValueError(f"{file.source}: tensor {name} has no place in a plain Llama model")
        tensor = file.tensor(name)
        if part in ("attn_q", "attn_k"):
            tensor = _unpermuted(tensor, heads if part == "attn_q" else kv_heads or heads)
        state[f"{known}.weight"] = tensor
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    model.train(False)
    return model


def _config(file: GGUF) -> LlamaConfig:
    get: Any = file.metadata.get
    if get("general.architecture") != "llama":
        raise ValueError(
            f"{file.source}: architecture {get('general.architecture')!r}, expected 'llama'"
        )
    if get("llama.rope.scaling.type", "none") != "none":
        raise ValueError(f"{file.source}: scaled rotary embeddings cannot be read")
    theta = float(get("llama.rope.freq_base", 10000.0))
    return LlamaConfig(
        vocab_size=len(get("tokenizer.ggml.tokens", ())) or get("llama.vocab_size"),
        hidden_size=get("llama.embedding_length"),
        intermediate_size=get("llama.feed_forward_length"),
        num_hidden_layers=get("llama.block_count"),
        num_attention_heads=get("llama.attention.head_count"),
        num_key_value_heads=get("llama.attention.head_count_kv"),
        max_position_embeddings=get("llama.context_length"),
        rms_norm_eps=get("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings="output.weight" not in file,
        use_cache=False,
    )


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
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if split == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    else:
        tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    kinds = meta.get("tokenizer.ggml.token_type", [])
    tokenizer.add_special_tokens(
        [token for token, kind in zip(tokens, kinds, strict=False) if kind == _CONTROL]
    )
    return Vocabulary(tokenizer.to_str(), meta["tokenizer.ggml.eos_token_id"])
