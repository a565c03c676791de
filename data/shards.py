"""Packed tokens on disk: the manifest, and memory-mapped shards read without a copy."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data.durable import write_durably
from data.plain import as_type, read_json

FORMAT_VERSION = 1
HEADER_BYTES = 128  # of a one-dimensional .npy file of any length
SplitName = Literal["train", "val"]
SPLITS: tuple[SplitName, ...] = ("train", "val")


@dataclass(frozen=True)
class Shard:
    """One .npy file of token ids."""

    file: str
    tokens: int
    sha256: str  # of the whole file


@dataclass(frozen=True)
class Split:
    """The documents of one split, each closed by EOS, concatenated and cut into shards."""

    documents: int
    tokens: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds; written last, so that its presence means complete."""

    dtype: str
    vocab_size: int
    eos_id: int
    tokenizer_file: str
    tokenizer_sha256: str
    train: Split
    val: Split
    text_bytes: int  # of both splits, as UTF-8
    empty_documents: int  # skipped: they hold nothing to predict
    arguments: dict[str, Any]  # the source and how it was read
    inputs: dict[str, str] | None = None  # SHA-256 by file; None: by a version that kept none
    lost_characters: dict[str, int] = field(default_factory=dict)  # which no id gives back

    @property
    def fingerprint(self) -> str:
        """Identifies tokens, vocabulary and split, wherever they lie, whatever the files' names."""
        return _digest(
            {
                "dtype": self.dtype,
                "vocab_size": self.vocab_size,
                "tokenizer": self.tokenizer_sha256,
                "train": [shard.sha256 for shard in self.train.shards],
                "val": [shard.sha256 for shard in self.val.shards],
            }
        )

    def split(self, name: SplitName) -> Split:
        """The split of this name."""
        return self.train if name == "train" else self.val

    def summary(self) -> str:
        """One line for people."""
        train, val = self.train, self.val
        lost = ""
        if count := sum(self.lost_characters.values()):
            examples = "".join(sorted(self.lost_characters)[:8])
            lost = f"{count:,} characters the tokenizer does not give back ({examples!r}), "
        return (
            f"{train.tokens:,} training and {val.tokens:,} validation tokens ({self.dtype}), "
            f"{train.documents:,} and {val.documents:,} documents, "
            f"{self.empty_documents:,} empty ones skipped, {lost}vocabulary {self.vocab_size:,}, "
            f"{self.text_bytes / (train.tokens + val.tokens):.2f} bytes/token, "
            f"fingerprint {self.fingerprint[:12]}"
        )

    def save(self, folder: Path) -> None:
        """Durable when it returns."""
        record = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            **asdict(self),
        }
        record["checksum"] = _digest(record)
        write_durably(folder / "manifest.json", json.dumps(record, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read `folder/manifest.json`; a change made after it was written is an error."""
        path = folder / "manifest.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} holds no manifest.json: make it with `lowbit prepare {folder}`"
            )
        record = as_type(dict[str, Any], read_json(path), str(path))
        try:
            version, checksum = record.pop("format_version"), record.pop("checksum")
            if version != FORMAT_VERSION:
                raise ValueError(f"{path}: format_version {version}, expected {FORMAT_VERSION}")
            if checksum != _digest({"format_version": version, **record}):
                raise ValueError(f"{path} was changed after `lowbit prepare` wrote it")
            del record["fingerprint"]
            record |= {name: _split(record[name]) for name in SPLITS}
            return cls(**record)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a manifest of `lowbit prepare`: {error}") from error


def _split(record: dict[str, Any]) -> Split:
    shards = tuple(Shard(**shard) for shard in record["shards"])
    for shard in shards:
        if not re.fullmatch(r"(train|val)-\d{5,}\.npy", shard.file):
            raise ValueError(f"{shard.file!r} is not the name of a shard")
    return Split(record["documents"], record["tokens"], shards)


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


class TokenShards:
    """One split as a sequence of tokens; reads are views of memory-mapped files."""

    def __init__(self, folder: Path, manifest: Manifest, split: SplitName) -> None:
        self._arguments = (folder, replace(manifest, inputs=None, lost_characters={}), split)
        shards = manifest.split(split).shards
        self._arrays = [np.load(folder / shard.file, mmap_mode="r") for shard in shards]
        self._ends = np.cumsum([shard.tokens for shard in shards], dtype=np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenShards, self._arguments  # a pickled memory map would carry its content along

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Tokens start..stop, copied only where they cross a shard border."""
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right")
        parts = []
        for index in range(first, last + 1):
            offset = int(self._ends[index - 1]) if index else 0
            parts.append(self._arrays[index][max(start - offset, 0) : stop - offset])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)
