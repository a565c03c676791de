"""Writing a GGUF file (version 3): metadata, the table of tensors, aligned data."""

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from data.vocabulary import EOS
from train.checkpoints.folder import file_digest

ALIGNMENT = 32
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # types of tokens
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_WORDS + "{1,3}" + _REST: "llama-bpe", _WORDS + _REST: "qwen2"}


@dataclass(frozen=True)
class Stored:
    """One tensor as its bytes."""

    kind: int  #: GGML's type
    shape: tuple[int, ...]  #: of its values, in torch's order
    data: Tensor  #: uint8


def write(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Stored]) -> str:
    """The whole file, on disk when it returns; its SHA-256."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(_text(key) + _value(value) for key, value in metadata.items())
    offset = 0
    for name, stored in tensors.items():
        head += _text(name) + struct.pack("<I", len(stored.shape))
        head += struct.pack(f"<{len(stored.shape)}Q", *reversed(stored.shape))
        head += struct.pack("<IQ", stored.kind, offset)
        offset += stored.data.numel() + -stored.data.numel() % ALIGNMENT
    with path.open("wb") as file:
        file.write(head + bytes(-len(head) % ALIGNMENT))
        for stored in tensors.values():
            file.write(stored.data.contiguous().numpy().data)
            file.write(bytes(-stored.data.numel() % ALIGNMENT))
        file.flush()
        os.fsync(file.fileno())
    return file_digest(path)


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Any) -> bytes:
    """With its type before it."""
    kind, data = _typed(value)
    return struct.pack("<I", kind) + data


def _typed(value: Any) -> tuple[int, bytes]:
    match value:
        case bool():
            return 7, struct.pack("<?", value)
        case int():
            return 4, struct.pack("<I", value)
        case float():
            return 6, struct.pack("<f", value)
        case str():
            return 8, _text(value)
        case list():
            kinds = {(5 if isinstance(item, int) else 8) for item in value} or {8}
            (kind,) = kinds
            items = b"".join(struct.pack("<i", v) if kind == 5 else _text(v) for v in value)
            return 9, struct.pack("<IQ", kind, len(value)) + items
    raise AssertionError(f"no GGUF type for {value!r}")


@dataclass(frozen=True)
class Tokens:
    """A byte-level BPE tokenizer as llama.cpp stores one."""

    plain: Mapping[str, Any]  #: tokenizer.json
    split: str  #: llama.cpp's name of how text is split before the merges
    template: str | None  #: of chats

    def metadata(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Its entries; ids that no token has, up to the model's vocabulary, are marked unused."""
        added = {token["id"]: token for token in self.plain["added_tokens"]}
        known = {id: token for token, id in self.plain["model"]["vocab"].items()}
        known |= {id: token["content"] for id, token in added.items()}
        size = max(config["vocab_size"], max(known) + 1)
        merges = self.plain["model"]["merges"]
        found = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": self.split,
            "tokenizer.ggml.tokens": [known.get(id, f"[PAD{id}]") for id in range(size)],
            "tokenizer.ggml.token_type": [_kind(id, known, added) for id in range(size)],
            "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
            "tokenizer.ggml.add_bos_token": False,
        }
        ends = [id for id, token in added.items() if token["content"] == EOS]
        for name, id in (("bos", config.get("bos_token_id")), ("eos", config.get("eos_token_id"))):
            id = id[0] if isinstance(id, list) else id
            if id not in added:  # a default of the configuration's class
                id = ends[0] if ends and name == "eos" else None
            if id is not None:
                found[f"tokenizer.ggml.{name}_token_id"] = id
        return found | ({"tokenizer.chat_template": self.template} if self.template else {})


def _kind(id: int, known: Mapping[int, str], added: Mapping[int, Any]) -> int:
    if id not in known:
        return _UNUSED
    if id not in added:
        return _NORMAL
    return _CONTROL if added[id]["special"] else _USER_DEFINED


def read_tokens(files: Mapping[str, bytes]) -> Tokens | None:
    """The tokenizer among `files`, if llama.cpp has a name for how it splits text."""
    if "tokenizer.json" not in files:
        return None
    plain = json.loads(files["tokenizer.json"])
    split = _split_of(plain)
    if split is None:
        return None
    template = json.loads(files.get("tokenizer_config.json", b"{}")).get("chat_template")
    if "chat_template.jinja" in files:
        template = files["chat_template.jinja"].decode()
    return Tokens(plain, split, template if isinstance(template, str) else None)


def _split_of(plain: Mapping[str, Any]) -> str | None:
    before = plain.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    if plain["model"].get("type") != "BPE" or steps[-1].get("type") != "ByteLevel":
        return None
    kinds = [step["type"] for step in steps]
    if not plain["model"]["merges"]:
        return "gpt-2"  # single bytes, however the text is split
    if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        return _SPLITS.get(steps[0]["pattern"].get("Regex", ""))
    return None
