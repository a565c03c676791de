"""Shards checked against their manifest once per machine, before the first step."""

import hashlib
import json
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.durable import write_durably
from data.files import digest
from data.shards import HEADER_BYTES, SPLITS, Manifest, Shard

_THREADS = 8  # hashing releases the interpreter lock


def verify(folder: Path, manifest: Manifest, *, trust_earlier: bool = True) -> None:
    """Raise if a file of `folder` is not the one that was prepared.

    A shard is read in full the first time, and again when its size, mtime or inode changed.
    """
    shards = [shard for name in SPLITS for shard in manifest.split(name).shards]
    stamps = check_present(folder, manifest)
    cache = machine_cache(folder)
    known = read_cache(cache) if trust_earlier else {}
    new = [shard for shard in shards if known.get(shard.file) != stamps[shard.file]]
    if new:
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            checks = pool.map(lambda shard: _check(folder, shard, manifest), new)
            list(tqdm(checks, "verifying shards", len(new), leave=False, disable=None))
        write_cache(cache, stamps)


def check_present(folder: Path, manifest: Manifest) -> dict[str, list[Any]]:
    """The shards' stamps; raise if one or the tokenizer is missing, or of another size."""
    shards = [shard for name in SPLITS for shard in manifest.split(name).shards]
    stamps = {shard.file: _stamp(folder, shard, manifest) for shard in shards}
    tokenizer = folder / manifest.tokenizer_file
    if not tokenizer.is_file() or digest(tokenizer) != manifest.tokenizer_sha256:
        raise ValueError(f"{tokenizer} is missing or not the one that was prepared")
    return stamps


def _stamp(folder: Path, shard: Shard, manifest: Manifest) -> list[Any]:
    path = folder / shard.file
    if not path.is_file():
        raise ValueError(f"{path} is missing: the manifest lists {shard.tokens} tokens in it")
    status = path.stat()
    size = HEADER_BYTES + shard.tokens * np.dtype(manifest.dtype).itemsize
    if status.st_size != size:
        raise ValueError(f"{path} has {status.st_size} bytes, expected {size}")
    return [shard.sha256, manifest.vocab_size, size, status.st_mtime_ns, status.st_ino]


def _check(folder: Path, shard: Shard, manifest: Manifest) -> None:
    path = folder / shard.file
    if digest(path) != shard.sha256:
        raise ValueError(f"{path} was changed or damaged: its sha256 is not the manifest's")
    largest = int(np.load(path, mmap_mode="r").max())
    if largest >= manifest.vocab_size:
        raise ValueError(f"{path} holds id {largest}, expected below {manifest.vocab_size}")


def machine_cache(folder: Path, kind: str = "verified") -> Path:
    """One file per machine and folder: a home may be shared, what a machine reads is not."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(f"{platform.node()}:{folder.resolve()}".encode()).hexdigest()
    return root / "lowbit" / kind / f"{name}.json"


def read_cache(cache: Path) -> dict[str, Any]:
    """The stamps of files that were read before, by name."""
    try:
        known: dict[str, Any] = json.loads(cache.read_text(encoding="utf-8"))
        return known
    except (OSError, ValueError):
        return {}  # the shards are then read again


def write_cache(cache: Path, stamps: dict[str, list[Any]]) -> None:
    """Keep stamps for `read_cache`, where that can be done."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_durably(cache, json.dumps(stamps))
    except OSError:
        pass  # a read-only home: every process verifies for itself
