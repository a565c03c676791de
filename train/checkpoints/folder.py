"""Checkpoints that are complete or not there: `step-00000050/{state.ckpt,manifest.json}`.

Lightning stages a save in the temporary directory and moves it over the previous file, which a kill
can destroy; so the writing, and the choice of what to resume from, are done here. A folder with any
other name (`.tmp` unfinished, `.old` on its way out, `.damaged`, `.superseded`) is no checkpoint.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from data.durable import sync_folder
from data.plain import explained
from train.checkpoints.distributed import METADATA, Like, insert_tensors, read_tensors

FORMAT_VERSION = 1
STATE, MANIFEST = "state.ckpt", "manifest.json"
_NAME = re.compile(r"step-(\d+)")


class DamagedCheckpointError(ValueError):
    """A checkpoint whose files are not those that were written."""


def step_of(path: Path) -> int:
    """The optimizer step a checkpoint folder is named after."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} is not a checkpoint: its name is not step-<number>")
    return int(match[1])


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders by ascending step, whatever their times say."""
    return sorted((p for p in folder.glob("step-*") if _NAME.fullmatch(p.name)), key=step_of)


# --- reading ------------------------------------------------------------------------------------


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder, down to the byte as it was written."""
    try:
        raw = (path / MANIFEST).read_bytes()
        manifest = json.loads(raw)
        del manifest["digest"]
        genuine = _encode(manifest) == raw
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path}: manifest missing or unreadable ({error})") from None
    if not genuine:
        raise DamagedCheckpointError(f"{path}: manifest is not what was written")
    if manifest["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {manifest['format_version']}, this program reads "
            f"{FORMAT_VERSION}"
        )
    return dict(manifest)


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """The manifest; raises DamagedCheckpointError unless every file has the SHA-256 in it."""
    manifest = read_manifest(path)
    step = manifest["origin"].get("step")
    if step is not None and step != step_of(path):
        raise DamagedCheckpointError(f"{path} is of step {step}: it was renamed")
    for name, digest in manifest["files"].items():
        if Path(name).name != name:
            raise DamagedCheckpointError(f"{path}: {name!r} is no file of the folder")
        try:
            found = file_digest(path / name)
        except OSError as error:
            raise DamagedCheckpointError(f"{path}: {name} cannot be read ({error})") from None
        if found != digest:
            raise DamagedCheckpointError(f"{path}: {name} is not what was written")
    return manifest


def load_state(
    path: Path, map_location: Any = "cpu", *, place: Like | None = None, mmap: bool = False
) -> dict[str, Any]:
    """The state of a verified checkpoint; plain data only, a pickle of anything else is refused.

    The tensors of a sharded one go where `place` says, by default each into a whole tensor.
    """
    with explained(f"{path / STATE} cannot be read"):
        state: dict[str, Any] = torch.load(
            path / STATE, map_location=map_location, weights_only=True, mmap=mmap
        )
    if (path / METADATA).exists():
        insert_tensors(state, read_tensors(path, place or _whole))
    return state


def _whole(name: str, item: TensorStorageMetadata) -> Tensor:
    return torch.empty(item.size, dtype=item.properties.dtype)


def find_resume_point(folder: Path, *, set_aside: bool = True) -> Path | None:
    """The newest undamaged checkpoint by step; damaged ones are renamed out of the way, said so.

    Raises DamagedCheckpointError where there are damaged ones only: never from scratch over them.
    `set_aside=False` is for the ranks that only look.
    """
    for path in reversed(complete_checkpoints(folder)):
        try:
            verify_checkpoint(path)
        except DamagedCheckpointError as error:
            if set_aside:
                print(f"lowbit: {error}; set aside as {rename_aside(path, 'damaged')}", flush=True)
            continue
        return path
    if any(folder.glob("step-*.damaged*")):
        raise DamagedCheckpointError(
            f"no undamaged checkpoint is left in {folder}: bring one back from a copy, or start "
            "anew in another run_dir"
        )
    return None


def rename_aside(path: Path, why: str) -> Path:
    """Rename a checkpoint so that it is none any more; its new path."""
    number, aside = 1, path.with_name(f"{path.name}.{why}")
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.{why}-{number}")
    return path.rename(aside)


def sweep_leftovers(folder: Path) -> None:
    """Remove what a kill left of a save or of a deletion; only the holder of the run's lock may."""
    for pattern in ("step-*.tmp", "step-*.old"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)


# --- writing ------------------------------------------------------------------------------------


class AtomicCheckpointIO(CheckpointIO):
    """Writes beside the target, syncs to disk, and renames the folder as the last act."""

    def __init__(self, chosen: Path | None = None) -> None:
        self._chosen = chosen  # which this process has just hashed

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        target = Path(path)
        staging = open_staging(target)
        try:
            files = {STATE: write_state(checkpoint, staging / STATE)}
            publish(staging, target, files, checkpoint.get("origin", {}))
        except OSError:
            shutil.rmtree(staging, ignore_errors=True)  # a full disk needs the room
            raise

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> Any:
        self.verify(Path(path))
        return load_state(Path(path), "cpu" if map_location is None else map_location)

    def verify(self, path: Path) -> None:
        """`verify_checkpoint`, once a process."""
        if path != self._chosen:
            verify_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        """By a rename first: a kill on the way leaves no half of a checkpoint."""
        shutil.rmtree(rename_aside(Path(path), "old"))


def open_staging(target: Path) -> Path:
    """An empty folder beside `target`, on the same file system."""
    staging = target.with_name(target.name + ".tmp")
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    return staging


def write_state(state: Mapping[str, Any], path: Path) -> str:
    """Write it durably; its SHA-256, taken of the bytes on their way."""
    with path.open("wb") as file:
        hashing = _HashingFile(file)
        try:
            torch.save(state, hashing)  # type: ignore[arg-type]  # it needs `write` alone
        except RuntimeError:
            if hashing.error is not None:  # torch's zip writer reports it as a wrong position
                raise hashing.error from None
            raise
        _to_disk(file)
    return hashing.digest.hexdigest()


def publish(staging: Path, target: Path, files: dict[str, str], origin: dict[str, Any]) -> None:
    """Seal a staged checkpoint with its manifest, and give it its name."""
    with (staging / MANIFEST).open("wb") as file:
        file.write(
            _encode({"format_version": FORMAT_VERSION, "files": files, "origin": dict(origin)})
        )
        _to_disk(file)
    sync_folder(staging)
    staging.rename(target)
    sync_folder(target.parent)


class _HashingFile:
    """A file that hashes what is written to it, and remembers why a write failed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _encode(manifest: dict[str, Any]) -> bytes:
    """The one way to write a manifest: with the hash of itself."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps(manifest | {"digest": digest}, indent=1, sort_keys=True).encode()


def file_digest(path: Path) -> str:
    """SHA-256 of its bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
