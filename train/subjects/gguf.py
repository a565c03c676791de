"""GGUF files (v2 and v3): their metadata, and their tensors dequantised to FP32."""

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_DEEPEST = 4  # of arrays within arrays, and of a tensor's dimensions


class _Reader:
    """Walks over the bytes; ValueError where they end before what they announce."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise ValueError(f"it ends before {count:,} bytes that it announces at {self.at:,}")
        self.at += count
        return self.data[self.at - count : self.at]

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        return bytes(self.take(self.scalar("Q"))).decode()

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY and depth < _DEEPEST:
            inner, length = self.scalar("I"), self.scalar("Q")
            return [self.value(inner, depth + 1) for _ in range(self.count(length))]
        if kind not in _SCALARS:
            raise ValueError(f"a value is of type {kind}, or nested too deep")
        return self.scalar(_SCALARS[kind])

    def count(self, announced: int) -> int:
        """Of things of which each has at least a byte."""
        if announced > len(self.data) - self.at:
            raise ValueError(f"it has no room for {announced:,} values at {self.at:,}")
        return announced


class GGUF:
    """The metadata and the tensors of one file."""

    def __init__(self, data: bytes | memoryview, source: str) -> None:
        self.source = source
        reader = _Reader(memoryview(data))
        if bytes(reader.data[:4]) != b"GGUF":
            raise ValueError(f"{source} is not a GGUF file")
        try:
            self._read(reader)
        except ValueError as error:
            raise ValueError(f"{source} is a damaged GGUF file: {error}") from None

    def _read(self, reader: _Reader) -> None:
        reader.at = 4
        version, tensors, entries = (reader.scalar(code) for code in "IQQ")
        if version not in (2, 3):
            raise ValueError(f"version {version}, expected 2 or 3")
        pairs = [
            (reader.string(), reader.value(reader.scalar("I")))
            for _ in range(reader.count(entries))
        ]
        infos = [self._info(reader) for _ in range(reader.count(tensors))]
        self.metadata, self._infos = dict(pairs), dict(infos)
        if len(self.metadata) < len(pairs) or len(self._infos) < len(infos):
            raise ValueError("a key or a tensor is there twice")
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"its alignment is {alignment!r}, expected a power of two")
        self._data = reader.data[reader.at + -reader.at % alignment :]

    @staticmethod
    def _info(reader: _Reader) -> tuple[str, tuple[tuple[int, ...], int, int]]:
        name, dims = reader.string(), reader.scalar("I")
        if dims > _DEEPEST:
            raise ValueError(f"{name[:40]!r} has {dims} dimensions")
        shape = tuple(reader.scalar("Q") for _ in range(dims))[::-1]
        return name, (shape, reader.scalar("I"), reader.scalar("Q"))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self._infos[name][0]

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
        count, rest = divmod(math.prod(shape), per_block)
        if rest or offset + count * size > len(self._data):
            raise ValueError(f"{self.source} is a damaged GGUF file: it has no room for {name}")
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
