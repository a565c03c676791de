"""Damage to a checkpoint is found, and the next older one used."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train.checkpoints.folder as checkpoint
from train.checkpoints.distributed import METADATA
from train.checkpoints.folder import MANIFEST, STATE, DamagedCheckpointError, find_resume_point

Save = Callable[..., Path]


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def empty(data: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("file", [STATE, MANIFEST, METADATA, "__0_0.distcp"])
@pytest.mark.parametrize("damage", [truncated, empty, None])
def test_truncated_0_byte_missing_newest(
    file: str, damage: Callable[[bytes], bytes] | None, tmp_path: Path, capsys: Any, save: Save
) -> None:
    old, new = save(tmp_path, 1), save(tmp_path, 2, "sharded")
    if damage is None:
        (new / file).unlink()
    else:
        (new / file).write_bytes(damage((new / file).read_bytes()))
    assert find_resume_point(tmp_path) == old
    said = capsys.readouterr().out
    assert "step-00000002" in said and "set aside as" in said
    assert [p.name for p in tmp_path.glob("*.damaged")] == ["step-00000002.damaged"]


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_bit_flipped_newest(kind: str, tmp_path: Path, save: Save) -> None:
    """200 single bits, anywhere in the files, each found; the seed is 0."""
    old, new = save(tmp_path, 1), save(tmp_path, 2, kind)
    chosen, found = random.Random(0), 0
    files = sorted(new.iterdir())
    for _ in range(200):
        file = chosen.choice(files)
        genuine = file.read_bytes()
        data = bytearray(genuine)
        data[chosen.randrange(len(data))] ^= 1 << chosen.randrange(8)
        file.write_bytes(data)
        found += find_resume_point(tmp_path) == old
        Path(f"{new}.damaged").rename(new)
        file.write_bytes(genuine)
    print(f"found {found} of 200 flipped bits")
    assert found == 200
    assert find_resume_point(tmp_path) == new


def test_two_damaged_ones_have_two_names(tmp_path: Path, save: Save) -> None:
    save(tmp_path, 1)
    for _ in range(2):
        (save(tmp_path, 2) / STATE).write_bytes(b"")
        find_resume_point(tmp_path)
    names = sorted(p.name for p in tmp_path.glob("*damaged*"))
    assert names == ["step-00000002.damaged", "step-00000002.damaged-2"]


def test_all_checkpoints_bad(tmp_path: Path, save: Save) -> None:
    """Never from scratch over a run that was: not now, and not at the second call either."""
    for step in (1, 2):
        (save(tmp_path, step) / STATE).write_bytes(b"")
    for _ in range(2):
        with pytest.raises(DamagedCheckpointError, match="no undamaged checkpoint is left"):
            find_resume_point(tmp_path)


def test_clock_skew(tmp_path: Path, save: Save) -> None:
    """The newest is the one of the highest step, whatever the times of the files say."""
    paths = [save(tmp_path, step) for step in (9, 10, 100)]
    for age, path in enumerate(reversed(paths)):
        os.utime(path, (age, age))
    assert find_resume_point(tmp_path) == paths[-1]


def test_version_drift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Save) -> None:
    """A checkpoint of another format is refused, not taken for damage."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT_VERSION", 2)
        save(tmp_path, 1)
    with pytest.raises(ValueError, match="format version 2, this program reads 1"):
        find_resume_point(tmp_path)
    assert not list(tmp_path.glob("*.damaged"))
