"""Shards and manifest: what is read is what was written, and any change to it is found."""

import json
import os
import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import log
from pathlib import Path

import numpy as np
import pytest

from data.prepare import prepare
from data.request import PrepareRequest
from data.shards import Manifest, TokenShards
from data.verify import inspect, unigram_entropy, verify


def concatenated(folder: Path, split: str) -> np.ndarray:
    return np.concatenate([np.load(path) for path in sorted(folder.glob(f"{split}-*.npy"))])


def test_reads_are_slices_of_the_concatenated_shards(folder: Path, manifest: Manifest) -> None:
    tokens, whole = TokenShards(folder, manifest, "train"), concatenated(folder, "train")
    assert len(tokens) == len(whole) == manifest.train.tokens > 3000
    for start, stop in [(0, 1), (0, 1000), (999, 1001), (1000, 2000), (500, 3001)]:
        assert tokens.read(start, stop).tolist() == whole[start:stop].tolist()
    assert tokens.read(len(whole) - 1, len(whole)).tolist() == whole[-1:].tolist()


def test_reads_within_a_shard_are_views_of_the_file(folder: Path, manifest: Manifest) -> None:
    tokens = TokenShards(folder, manifest, "train")
    view, again = tokens.read(10, 20), tokens.read(15, 30)
    assert isinstance(view, np.memmap) and np.shares_memory(view, again)
    assert len(pickle.dumps(tokens)) < 4096  # a worker process maps the files itself


def test_shards_have_the_size_asked_for(manifest: Manifest) -> None:
    *full, last = [shard.tokens for shard in manifest.train.shards]
    assert set(full) == {1000} and 0 < last <= 1000


def test_the_fingerprint_is_of_the_content(
    tmp_path: Path, manifest: Manifest, request_of: Callable[..., PrepareRequest]
) -> None:
    elsewhere = prepare(tmp_path / "else" / "where", request_of(shard_tokens=1000))
    assert elsewhere.fingerprint == manifest.fingerprint
    shards = [
        replace(shard, file=f"train-9{i:04d}.npy") for i, shard in enumerate(manifest.train.shards)
    ]
    renamed = replace(manifest, train=replace(manifest.train, shards=tuple(shards)))
    assert renamed.fingerprint == manifest.fingerprint
    other_split = replace(manifest, train=manifest.val, val=manifest.train)
    other_dtype = replace(manifest, dtype="uint32")
    other_tokenizer = replace(manifest, tokenizer_sha256="0" * 64)
    fingerprints = {
        prepared.fingerprint for prepared in (manifest, other_split, other_dtype, other_tokenizer)
    }
    assert len(fingerprints) == 4


def test_an_untouched_folder_is_read_once(
    folder: Path, manifest: Manifest, verified_cache: Path
) -> None:
    verify(folder, manifest)
    [cache] = verified_cache.iterdir()
    before = cache.stat().st_mtime_ns
    verify(folder, manifest)
    assert cache.stat().st_mtime_ns == before


def test_a_touched_shard_is_read_again(folder: Path, manifest: Manifest) -> None:
    verify(folder, manifest)
    path = folder / "train-00001.npy"
    flip_bit(path, 700)
    with pytest.raises(ValueError, match=r"train-00001\.npy was changed or damaged"):
        verify(folder, manifest)


def flip_bit(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: flip_bit(folder / "train-00000.npy", 128), "changed or damaged"),
        (lambda folder: flip_bit(folder / "val-00000.npy", -1), "changed or damaged"),
        (lambda folder: truncate(folder / "train-00002.npy"), "bytes, expected"),
        (lambda folder: (folder / "train-00001.npy").unlink(), "is missing"),
        (lambda folder: flip_bit(folder / "tokenizer.json", 100), "tokenizer.json is missing or"),
        (lambda folder: edit_manifest(folder, vocab_size=5), "was changed after"),
        (lambda folder: edit_manifest(folder, empty_documents=1), "was changed after"),
        (lambda folder: edit_manifest(folder, format_version=2), "format_version 2, expected 1"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "expected dict"),
    ],
)
def test_damage_is_found(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=message):
        inspect(folder)


def test_an_id_outside_the_vocabulary_is_found(folder: Path, manifest: Manifest) -> None:
    with pytest.raises(ValueError, match="holds id 256, expected below 100"):
        verify(folder, replace(manifest, vocab_size=100))


def test_a_manifest_names_no_file_outside_its_folder(folder: Path, manifest: Manifest) -> None:
    shard = replace(manifest.train.shards[0], file="../train-00000.npy")
    replace(manifest, train=replace(manifest.train, shards=(shard,))).save(folder)
    with pytest.raises(ValueError, match="is not the name of a shard"):
        Manifest.load(folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="lowbit prepare"):
        Manifest.load(tmp_path)


def test_a_cache_that_cannot_be_written_is_done_without(
    folder: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "manifest.json"))  # no folder
    verify(folder, manifest)


def test_unigram_entropy_is_that_of_a_plain_count(folder: Path, manifest: Manifest) -> None:
    tokens = TokenShards(folder, manifest, "train")
    counts = Counter(tokens.read(0, len(tokens)).tolist())
    shares = [count / len(tokens) for count in counts.values()]
    expected = -sum(p * log(p) for p in shares)
    assert unigram_entropy(tokens, manifest.vocab_size) == pytest.approx(expected, abs=1e-9)
