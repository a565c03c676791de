"""Files checked against what was recorded of them: shards before a run, inputs before more text.

Content decides; the stamps of what this machine has read before save reading it again.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.durable import write_durably
from data.files import digest
from data.plain import as_type, read_json, read_text
from data.shards import HEADER_BYTES, SPLITS, Manifest, Shard, TokenShards
from data.vocabulary import Vocabulary

Stamp = list[int]
_GRAIN_NS = 2 * 10**9  # a file changed twice within a clock's grain may keep its times
_THREADS = 8  # hashing releases the interpreter lock


def verify(folder: Path, manifest: Manifest, *, trust_earlier: bool = True) -> None:
    """Raise if a file of `folder` is not the one that was prepared.

    A shard is read in full the first time, and again when its size, mtime or inode changed.
    """
    shards = [shard for name in SPLITS for shard in manifest.split(name).shards]
    stamps = check_present(folder, manifest)
    cache = _machine_cache(folder)
    known = _read_cache(cache) if trust_earlier else {}
    new = [shard for shard in shards if known.get(shard.file) != stamps[shard.file]]
    if new:
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            checks = pool.map(lambda shard: _check(folder, shard, manifest), new)
            list(tqdm(checks, "verifying shards", len(new), leave=False, disable=None))
        _write_cache(cache, stamps)


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


def _machine_cache(folder: Path, kind: str = "verified") -> Path | None:
    """One file per machine and folder: a home may be shared, what a machine reads is not. None for
    who has no home, as in containers.
    """
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    name = hashlib.sha256(f"{platform.node()}:{folder.resolve()}".encode()).hexdigest()
    return root / "lowbit" / kind / f"{name}.json"


def _read_cache(cache: Path | None) -> dict[str, Any]:
    """The stamps of files that were read before, by name."""
    if cache is None:
        return {}
    try:
        known: dict[str, Any] = as_type(dict[str, list[Any]], read_json(cache), str(cache))
        return known
    except (OSError, ValueError):
        return {}  # the shards are then read again


def _write_cache(cache: Path | None, stamps: dict[str, list[Any]]) -> None:
    """Keep stamps for `_read_cache`, where that can be done."""
    if cache is None:
        return
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_durably(cache, json.dumps(stamps))
    except OSError:
        pass  # a read-only home: every process verifies for itself


def stamp(path: Path) -> Stamp:
    """Size, times and inode; no program sets the change time, so any write shows."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def stamps_of(paths: Iterable[Path]) -> dict[str, Stamp]:
    return {str(path): stamp(path) for path in paths}


def changed_files(
    folder: Path, known: Mapping[str, str], *, trust_earlier: bool = True
) -> list[str]:
    """Of the files of `folder` that `known` names, those that have not the SHA-256 in it.

    With `trust_earlier`, what this machine has read since it was written costs a `stat`.
    """
    started, cache = time.time_ns(), _machine_cache(folder, "files")
    seen = _read_cache(cache) if trust_earlier else {}
    stamps = {name: stamp(folder / name) for name in known}
    entries: dict[str, list[Any]] = {n: [known[n], *own] for n, own in stamps.items()}
    changed = [
        name
        for name, entry in entries.items()
        if seen.get(name) != entry and digest(folder / name) != known[name]
    ]
    old = {n: entries[n] for n, s in stamps.items() if max(s[1], s[2]) < started - _GRAIN_NS}
    if not changed and old != seen:
        _write_cache(cache, old)
    return changed


def refuse_changes(
    folder: Path,
    known: Mapping[str, str | None],
    stamps: Mapping[str, Stamp],
    paths: Iterable[Path],
) -> None:
    """Raise unless `paths` are the files of `known` with their SHA-256; a file of another stamp is
    read, and has changed where its hash was not known yet.
    """
    names = {str(path) for path in paths}
    found = [f"{name} is new" for name in sorted(names - known.keys())]
    found += [f"{name} is gone" for name in sorted(known.keys() - names)]
    for name in sorted(names & known.keys()):
        path = Path(name)
        if stamps.get(name) != stamp(path) and (known[name] is None or digest(path) != known[name]):
            found.append(f"{name} changed")
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(
            f"{folder} was prepared from other files ({'; '.join(found[:3])}{more}): "
            "choose another folder or delete this one"
        )


def check_complete(folder: Path, inputs: Mapping[str, str], paths: Iterable[Path]) -> None:
    """`refuse_changes` for a complete folder: what this machine has read since is known."""
    paths = list(paths)
    started, cache = time.time_ns(), _machine_cache(folder, "inputs")
    refuse_changes(folder, inputs, _read_cache(cache), paths)
    remember(folder, stamps_of(paths), started)


def remember(folder: Path, stamps: Mapping[str, Stamp], started: int) -> None:
    """Keep on this machine which stamps the files had when they were read, from `started` on."""
    old = {name: s for name, s in stamps.items() if max(s[1], s[2]) < started - _GRAIN_NS}
    _write_cache(_machine_cache(folder, "inputs"), old)


_SAMPLE_TOKENS = 200
_CHUNK = 2**24


def inspect(folder: Path) -> str:
    """Statistics and the beginning of each split, after every hash was checked anew."""
    manifest = Manifest.load(folder)
    verify(folder, manifest, trust_earlier=False)
    json = read_text(folder / manifest.tokenizer_file)
    vocabulary = Vocabulary(json, manifest.eos_id)
    lines = [f"{folder}: every hash is right", manifest.summary()]
    for name in SPLITS:
        tokens = TokenShards(folder, manifest, name)
        lines.append(f"--- {name}: {len(manifest.split(name).shards)} shards, beginning with")
        if len(tokens):
            entropy = unigram_entropy(tokens, manifest.vocab_size)
            lines.append(f"{name} unigram entropy: {entropy:.4f} nats per token")
            sample = tokens.read(0, min(_SAMPLE_TOKENS, len(tokens)))
            lines.append(vocabulary.decode(sample.tolist()))
    return "\n".join(lines)


def unigram_entropy(tokens: TokenShards, vocab_size: int) -> float:
    """-sum p log p over the frequencies of the ids, in nats: what a model must beat that knows only
    how frequent each token is.
    """
    counts = np.zeros(vocab_size)
    for first in range(0, len(tokens), _CHUNK):
        chunk = tokens.read(first, min(first + _CHUNK, len(tokens)))
        counts += np.bincount(chunk, minlength=vocab_size)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())
