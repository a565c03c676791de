"""GGUF files written here by the format's description, read back."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from train.subjects.gguf import GGUF, read_gguf
from train.subjects.gguf_llama import llama_of, vocabulary_of

STRING, UINT32, FLOAT32, ARRAY, INT32 = 8, 4, 6, 9, 5


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _entry(key: str, value: object) -> bytes:
    if isinstance(value, str):
        return _string(key) + struct.pack("<I", STRING) + _string(value)
    if isinstance(value, int):
        return _string(key) + struct.pack("<II", UINT32, value)
    if isinstance(value, float):
        return _string(key) + struct.pack("<If", FLOAT32, value)
    assert isinstance(value, list)
    kind = STRING if isinstance(value[0], str) else INT32
    items = [_string(item) if kind == STRING else struct.pack("<i", item) for item in value]
    return _string(key) + struct.pack("<IIQ", ARRAY, kind, len(value)) + b"".join(items)


def _file(metadata: dict, tensors: dict[str, tuple[tuple[int, ...], int, bytes]]) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(_entry(key, value) for key, value in metadata.items())
    data = b""
    for name, (shape, kind, raw) in tensors.items():
        data += b"\0" * (-len(data) % 32)
        head += _string(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *shape[::-1]) + struct.pack("<IQ", kind, len(data))
        data += raw
    return head + b"\0" * (-len(head) % 32) + data


def test_block_types_decode_by_their_definition() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (2, 32), dtype=np.uint8)
    packed = codes[:, :16] | codes[:, 16:] << 4  # element i is low nibble i, i + 16 high nibble i
    d, m = struct.pack("<e", 0.25), struct.pack("<e", -1.5)
    signed = codes.astype(np.int8) - 8
    file = GGUF(
        _file(
            {"general.architecture": "llama"},
            {
                "a": ((2, 32), 3, b"".join(d + m + row.tobytes() for row in packed)),
                "b": ((2, 32), 2, b"".join(d + row.tobytes() for row in packed)),
                "c": ((64,), 8, b"".join(d + row.tobytes() for row in signed)),
                "d": ((3,), 30, np.array([0x3F80, 0xC000, 0], np.uint16).tobytes()),
                "e": ((2,), 1, np.array([0.5, -2], np.float16).tobytes()),
                "f": ((1,), 12, b"\0" * 144),
            },
        ),
        "test.gguf",
    )
    assert np.array_equal(file.tensor("a"), codes * np.float32(0.25) - 1.5)
    assert np.array_equal(file.tensor("b"), signed * np.float32(0.25))
    assert np.array_equal(file.tensor("c"), signed.ravel() * np.float32(0.25))
    assert file.tensor("d").tolist() == [1.0, -2.0, 0.0]
    assert file.tensor("e").tolist() == [0.5, -2.0]
    with pytest.raises(ValueError, match="GGML type 12, readable are F32"):
        file.tensor("f")


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=260, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
            rms_norm_eps=2.0**-16, tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        )
    )  # fmt: skip


def _exported(model: LlamaForCausalLM, changes: dict | None = None) -> bytes:
    """As llama.cpp writes it: rows of q and k reordered, so that rotary pairs lie together."""
    config, tensors = model.config, {}
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {f"{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    whole = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    for name, weight in model.state_dict().items():
        *path, part, _ = name.split(".")
        value = weight.numpy()
        if part in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
            rows = [
                head * 16 + (i % 2) * 8 + i // 2 for head in range(heads) for i in range(16)
            ]  # new row i of a head: even ones from its first half
            value = value[rows]
        stem = whole[part] if part in whole else f"blk.{path[2]}.{names[part]}"
        tensors[f"{stem}.weight"] = (value.shape, 0, value.tobytes())
    metadata = {
        "general.architecture": "llama", "llama.embedding_length": 64,
        "llama.feed_forward_length": 96, "llama.block_count": 2, "llama.context_length": 128,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 2.0**-16, "llama.rope.freq_base": 1000.0,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["<e>", "a", "b", "ab", *(f"t{i}" for i in range(256))],
        "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.token_type": [3, *[1] * 259],
        "tokenizer.ggml.eos_token_id": 0,
    }  # fmt: skip
    return _file(metadata | (changes or {}), tensors)


def test_an_exported_model_comes_back_bitwise(model: LlamaForCausalLM, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(_exported(model))
    file = read_gguf(path)
    ids = torch.arange(24)[None]
    with torch.no_grad():
        assert torch.equal(llama_of(file)(ids).logits, model.eval()(ids).logits)
    assert vocabulary_of(file).encode("abba").tolist() == [3, 2, 1]


def _head(*entries: bytes, tensors: bytes = b"", count: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, count, len(entries)) + b"".join(entries) + tensors


def _info(name: str, shape: tuple[int, ...], offset: int) -> bytes:
    head = _string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
    return head + struct.pack("<IQ", 0, offset)


DEEP = struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 5000
DAMAGED: dict[str, bytes] = {
    "ends in a number": _head(_entry("a", 5))[:-2],
    "a string of 2^63": _head(struct.pack("<Q", 2**63) + b"a"),
    "an array of 2^60": _head(_string("a") + struct.pack("<IIQ", ARRAY, UINT32, 2**60)),
    "2^61 keys": b"GGUF" + struct.pack("<IQQ", 3, 0, 2**61),
    "2^61 tensors": b"GGUF" + struct.pack("<IQQ", 3, 2**61, 0),
    "arrays in arrays": _head(_string("a") + DEEP),
    "a type that is none": _head(_string("a") + struct.pack("<I", 99)),
    "no alignment": _head(_entry("general.alignment", 0)),
    "alignment of text": _head(_entry("general.alignment", "a")),
    "alignment 3": _head(_entry("general.alignment", 3)),
    "a key twice": _head(_entry("a", 1), _entry("a", 2)),
    "a tensor twice": _head(tensors=_info("t", (1,), 0) * 2, count=2),
    "a tensor of 2^31 dimensions": _head(tensors=_string("t") + struct.pack("<I", 2**31), count=1),
    "no text": _head(struct.pack("<Q", 1) + b"\xff" + struct.pack("<II", UINT32, 1)),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_line(name: str) -> None:
    with pytest.raises(ValueError, match=r"^x is a damaged GGUF file: ") as raised:
        GGUF(DAMAGED[name], "x")
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize(
    ("shape", "offset"), [((2**40, 2**40), 0), ((4,), 2**62), ((4,), 2), ((2**63, 2), 0)]
)
def test_a_tensor_that_is_not_there_is_named(shape: tuple[int, ...], offset: int) -> None:
    raw = _head(tensors=_info("t", shape, offset), count=1)
    file = GGUF(raw + b"\0" * (-len(raw) % 32 + 16), "x")
    with pytest.raises(ValueError, match="x is a damaged GGUF file: it has no room for t"):
        file.tensor("t")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("llama.block_count", 2**31 - 1, "lacks tensors of its 2147483647 layers"),
        ("llama.block_count", 3, "model.layers.2.input_layernorm.weight is None, expected (64,)"),
        ("llama.embedding_length", "64", "llama.embedding_length is '64', expected a positive int"),
        ("llama.embedding_length", 128, "lm_head.weight is (260, 64), expected (260, 128)"),
        ("llama.attention.head_count", 0, "llama.attention.head_count is '0', expected"),
        ("llama.attention.head_count_kv", 3, "heads do not divide its width"),
        ("llama.rope.freq_base", -1.0, "llama.rope.freq_base is '-1.0', expected"),
        ("tokenizer.ggml.eos_token_id", 5000, "its end of document is token 5000 of 260"),
        ("tokenizer.ggml.tokens", [1, 2], "tokenizer.ggml.tokens[0] is 1, expected str"),
        ("tokenizer.ggml.merges", ["ab"], "its tokenizer cannot be rebuilt"),
    ],
)
def test_what_no_llama_says_is_named(
    model: LlamaForCausalLM, key: str, value: object, said: str
) -> None:
    raw = _exported(model, {key: value})
    with pytest.raises(ValueError) as raised:
        vocabulary_of(GGUF(raw, "x"))
        llama_of(GGUF(raw, "x"))
    assert said in str(raised.value) and str(raised.value).startswith("x")


def test_what_is_not_readable_says_so(model: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x is not a GGUF file"):
        GGUF(b"GGML" + bytes(64), "x")
    with pytest.raises(ValueError, match="x is a damaged GGUF file"):
        GGUF(_exported(model)[:300], "x")
    with pytest.raises(ValueError, match="architecture 'gemma'"):
        llama_of(GGUF(_file({"general.architecture": "gemma"}, {}), "x"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_gguf(tmp_path / "absent.gguf")
