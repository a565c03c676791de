"""Safetensors files written tensor by tensor: memory is that of a part of one."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import safe_open
from torch import Tensor

from data.plain import as_type

SHARD_BYTES = 5 * 10**9
_CHUNK = 1 << 24
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its head, and its bytes when they are asked for."""

    name: str
    dtype: str  #: as safetensors spells it
    shape: tuple[int, ...]
    nbytes: int
    chunks: Callable[[], Iterable[bytes]]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "Entry":
        """One that is in memory."""
        tensor = tensor.detach().cpu().contiguous()
        data = tensor.reshape(-1).view(torch.uint8).numpy()
        shape = tuple(tensor.shape)
        return cls(name, _NAMES[tensor.dtype], shape, data.nbytes, lambda: [data.tobytes()])

    def renamed(self, name: str) -> "Entry":
        """The same bytes under another name."""
        return Entry(name, self.dtype, self.shape, self.nbytes, self.chunks)


def entries_of(path: Path) -> Iterator[Entry]:
    """The tensors of a safetensors file, by name; ValueError for another kind of file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            if length > 10**8:
                raise ValueError("its header is too long")
            head = as_type(dict[str, Any], json.loads(file.read(length)), "its header")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from None
    head.pop("__metadata__", None)
    for name, one in sorted(as_type(dict[str, _Held], head, str(path)).items()):
        begin, end = one["data_offsets"] if len(one["data_offsets"]) == 2 else (1, 0)
        if not 0 <= begin <= end <= path.stat().st_size - 8 - length:
            raise ValueError(f"{path}: {name[:60]} does not lie in the file")
        chunks = _region(path, 8 + length + begin, end - begin)
        yield Entry(name, one["dtype"], tuple(one["shape"]), end - begin, chunks)


class _Held(TypedDict):
    """A tensor in the header of a safetensors file."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]  # where its bytes begin and end, after the header


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, by name."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def _region(path: Path, begin: int, nbytes: int) -> Callable[[], Iterable[bytes]]:
    def read() -> Iterator[bytes]:
        with path.open("rb") as file:
            file.seek(begin)
            left = nbytes
            while left:
                chunk = file.read(min(_CHUNK, left))
                if not chunk:
                    raise ValueError(f"{path} ends before its tensors do")
                left -= len(chunk)
                yield chunk

    return read


def write_tensors(folder: Path, entries: Iterable[Entry]) -> dict[str, str]:
    """`model.safetensors`, or shards with an index; SHA-256 by file. On disk when it returns."""
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.nbytes for e in shards[-1]) + entry.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(entry)
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if count == 1:
        names = ["model.safetensors"]
    digests = {n: _write_file(folder / n, s) for n, s in zip(names, shards, strict=True)}
    if count > 1:
        index = {
            "metadata": {"total_size": sum(e.nbytes for shard in shards for e in shard)},
            "weight_map": {e.name: n for n, s in zip(names, shards, strict=True) for e in s},
        }
        name = "model.safetensors.index.json"
        digests[name] = write_bytes(folder / name, json.dumps(index, indent=1).encode())
    return digests


def _write_file(path: Path, entries: Sequence[Entry]) -> str:
    """Wide types first, so that every tensor lies where its type may."""
    ordered = sorted(entries, key=lambda e: (-DTYPES[e.dtype].itemsize, e.name))
    at, head = 0, dict[str, Any](__metadata__={"format": "pt"})
    for e in ordered:
        head[e.name] = {
            "dtype": e.dtype, "shape": list(e.shape), "data_offsets": [at, at + e.nbytes],
        }  # fmt: skip
        at += e.nbytes
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _write(path, [len(text).to_bytes(8, "little"), text], ordered)


def write_bytes(path: Path, data: bytes) -> str:
    """A small file, on disk when it returns; its SHA-256."""
    return _write(path, [data], ())


def _write(path: Path, first: Iterable[bytes], entries: Iterable[Entry]) -> str:
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in first:
            digest.update(chunk)
            file.write(chunk)
        for entry in entries:
            for chunk in entry.chunks():
                digest.update(chunk)
                file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
