"""Shards as they grow: appended to, made durable, taken up again after a kill."""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.shards import HEADER_BYTES, Shard, Split, SplitName


@dataclass
class SplitProgress:
    """What is written of a split; plain data, for the journal."""

    documents: int = 0
    shards: list[Shard] = field(default_factory=list)
    open_tokens: int = 0  # in the shard after those

    @property
    def tokens(self) -> int:
        """In all shards."""
        return sum(shard.tokens for shard in self.shards) + self.open_tokens


class SplitWriter:
    """Appends ids to the shards of one split, all but the last of the same size."""

    def __init__(
        self, folder: Path, split: SplitName, dtype: str, shard_tokens: int, progress: SplitProgress
    ) -> None:
        self._folder = folder
        self._split = split
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._shard_tokens = shard_tokens
        self.progress = progress

    @property
    def _path(self) -> Path:
        return self._folder / f"{self._split}-{len(self.progress.shards):05d}.npy"

    def append(self, ids: NDArray[Any], documents: int) -> None:
        """Write `ids` at the place `progress` says, over whatever a killed process left there."""
        self.progress.documents += documents
        while len(ids):
            room = self._shard_tokens - self.progress.open_tokens
            part, ids = ids[:room], ids[room:]
            self._path.touch()
            with self._path.open("r+b") as file:
                file.seek(HEADER_BYTES + self.progress.open_tokens * self._dtype.itemsize)
                file.write(part.astype(self._dtype, copy=False).tobytes())
            self.progress.open_tokens += len(part)
            if self.progress.open_tokens == self._shard_tokens:
                self._close_shard()

    def sync(self) -> None:
        """Make the open shard durable; the closed ones are."""
        if self.progress.open_tokens:
            with self._path.open("rb") as file:
                os.fsync(file.fileno())

    def finish(self) -> Split:
        """Close the last shard."""
        if self.progress.open_tokens:
            self._close_shard()
        progress = self.progress
        return Split(progress.documents, progress.tokens, tuple(progress.shards))

    def _close_shard(self) -> None:
        """Only now the file gets a header: until then it is no array."""
        tokens = self.progress.open_tokens
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (tokens,)}
        with self._path.open("r+b") as file:
            file.truncate(HEADER_BYTES + tokens * self._dtype.itemsize)
            np.lib.format.write_array_header_1_0(file, header)
            assert file.tell() == HEADER_BYTES
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.progress.shards.append(Shard(self._path.name, tokens, digest))
        self.progress.open_tokens = 0
