"""A checkpoint is there whole or not at all, whatever happens while it is written or after."""

import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from train.checkpoints.folder import (
    STATE,
    AtomicCheckpointIO,
    complete_checkpoints,
    find_resume_point,
    load_state,
    read_manifest,
    sweep_leftovers,
    verify_checkpoint,
)

Save = Callable[..., Path]


def holds(path: Path, step: int) -> bool:
    return torch.equal(load_state(path)["state_dict"]["weights"], torch.full((300,), float(step)))


# --- a crash at every system call -------------------------------------------------------------


class Disk:
    """Ends the process at the n-th operation; knows which bytes a power cut would lose."""

    OPERATIONS = ("mkdir", "open", "write", "fsync", "rename", "rmtree")

    def __init__(self, crash_at: int, half: bool) -> None:
        self.crash_at, self.half = crash_at, half
        self.operations: list[str] = []
        self.unsynced: set[str] = set()

    def reached(self, operation: str) -> bool:
        self.operations.append(operation)
        return len(self.operations) == self.crash_at

    def crash(self) -> None:
        for path in self.unsynced:  # the power cut: what was not synced is gone
            if os.path.exists(path):
                os.truncate(path, 0)
        os._exit(77)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        open_, fsync, rename, mkdir = pathlib.Path.open, os.fsync, pathlib.Path.rename, os.mkdir

        def opening(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if "w" not in mode:
                return open_(path, mode, *args, **kwargs)
            if self.reached("open"):
                self.crash()
            self.unsynced.add(str(path))
            return Watched(open_(path, mode, *args, **kwargs), self, str(path))

        def syncing(descriptor: int) -> None:
            if self.reached("fsync"):
                self.crash()
            fsync(descriptor)
            self.unsynced.discard(os.readlink(f"/proc/self/fd/{descriptor}"))

        def renaming(path: Path, target: Path) -> Path:
            if self.reached("rename"):
                self.crash()
            moved = rename(path, target)
            prefix = f"{path}/"
            self.unsynced = {
                str(target) + "/" + name.removeprefix(prefix) if name.startswith(prefix) else name
                for name in self.unsynced
            }
            return moved

        def making(path: Any, *args: Any, **kwargs: Any) -> None:
            if self.reached("mkdir"):
                self.crash()
            mkdir(path, *args, **kwargs)

        monkeypatch.setattr(pathlib.Path, "open", opening)
        monkeypatch.setattr(os, "fsync", syncing)
        monkeypatch.setattr(pathlib.Path, "rename", renaming)
        monkeypatch.setattr(os, "mkdir", making)


class Watched:
    """A file whose writes are operations of `disk`; a crash may come after half of one."""

    def __init__(self, file: Any, disk: Disk, path: str) -> None:
        self.file, self.disk, self.path = file, disk, path

    def write(self, data: bytes) -> int:
        if self.disk.reached("write"):
            if self.disk.half:
                self.file.write(data[: len(data) // 2])
                self.file.flush()
            self.disk.crash()
        written: int = self.file.write(data)
        return written

    def __enter__(self) -> "Watched":
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def in_child(act: Callable[[], Any]) -> int:
    child = os.fork()
    if child == 0:
        try:
            act()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture(params=["same file system", "TMPDIR elsewhere"])
def folder(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    if request.param == "same file system":
        yield tmp_path
        return
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system here")
    with tempfile.TemporaryDirectory(dir=shm) as other:
        monkeypatch.setattr(tempfile, "tempdir", other)
        monkeypatch.setenv("TMPDIR", other)
        yield tmp_path
        assert os.listdir(other) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(("half", "kind"), [(False, "full"), (True, "full"), (True, "sharded")])
def test_sigkill_mid_write(
    half: bool, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, save: Save
) -> None:
    """At each system call of a save, and with half of the write done: the old or the new one."""
    save(folder, 1, kind)
    operations: list[str] = []

    def crashing(at: int) -> Callable[[], None]:
        def act() -> None:
            with monkeypatch.context() as patch:
                disk = Disk(at, half)
                disk.install(patch)
                save(folder, 2, kind)
            (folder / "operations").write_text(json.dumps(disk.operations))

        return act

    crashes = 0
    while (code := in_child(crashing(crashes + 1))) == 77:
        crashes += 1
        sweep_leftovers(folder)
        assert not list(folder.glob("*.tmp"))
        point = find_resume_point(folder)
        assert point is not None
        verify_checkpoint(point)
        step = 2 if point.name == "step-00000002" else 1
        assert holds(point, step)
        assert not list(folder.glob("*.damaged"))
        shutil.rmtree(folder / "step-00000002", ignore_errors=True)
    assert code == 0
    operations = json.loads((folder / "operations").read_text())
    assert crashes == len(operations)
    assert {"mkdir", "open", "write", "fsync", "rename"} <= set(operations)
    files = 2 if kind == "full" else 4
    assert operations.count("fsync") == files + 2  # the folder, the folder around it
    assert operations[-2:] == ["rename", "fsync"]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_kill_while_an_old_checkpoint_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Save
) -> None:
    old, new = save(tmp_path, 1), save(tmp_path, 2)

    def remove() -> None:
        monkeypatch.setattr(shutil, "rmtree", lambda path: os._exit(77))
        AtomicCheckpointIO().remove_checkpoint(old)

    assert in_child(remove) == 77
    assert complete_checkpoints(tmp_path) == [new]
    sweep_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [new.name]


def test_the_manifest_says_what_it_is_of(tmp_path: Path, save: Save) -> None:
    manifest = read_manifest(save(tmp_path, 3))
    assert manifest["origin"] == {"step": 3}
    assert set(manifest["files"]) == {STATE}
    assert set(manifest) == {"format_version", "files", "origin"}
