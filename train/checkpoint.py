"""Checkpoints that are complete or not there: `step-00000050/{state.ckpt,manifest.json}`.

Lightning stages a save in the temporary directory and moves it over the previous file, which a kill
can destroy; so the writing, and the choice of what to resume from, are done here.
"""

import hashlib
import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer

FORMAT_VERSION = 1
_STATE, _MANIFEST = "state.ckpt", "manifest.json"
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
    """Checkpoint folders by ascending step; unfinished ones have another name."""
    return sorted((p for p in folder.glob("step-*") if _NAME.fullmatch(p.name)), key=step_of)


def verify_checkpoint(path: Path) -> None:
    """Raise DamagedCheckpointError unless every file has the size and SHA-256 of the manifest."""
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
        files, version = manifest["files"], manifest["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(
            f"{path}: manifest is missing or unreadable ({error})"
        ) from None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, this program reads {FORMAT_VERSION}"
        )
    for name, digest in files.items():
        if not (path / name).is_file() or _sha256(path / name) != digest:
            raise DamagedCheckpointError(f"{path}: {name} is not what was written")


def find_resume_point(folder: Path) -> Path | None:
    """The newest undamaged checkpoint by step; damaged ones are renamed out of the way, said so."""
    for path in reversed(complete_checkpoints(folder)):
        try:
            verify_checkpoint(path)
        except DamagedCheckpointError as error:
            quarantine = path.with_name(path.name + ".damaged")
            path.replace(quarantine)
            print(f"lowbit: damaged checkpoint set aside as {quarantine}: {error}", flush=True)
            continue
        return path
    return None


class AtomicCheckpointIO(CheckpointIO):
    """Writes beside the target, syncs to disk, and renames the folder as the last act."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        target = Path(path)
        staging = target.with_name(target.name + ".tmp")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        with (staging / _STATE).open("wb") as file:
            torch.save(checkpoint, file)
            _to_disk(file)
        files = {_STATE: _sha256(staging / _STATE)}
        with (staging / _MANIFEST).open("w") as file:
            json.dump({"format_version": FORMAT_VERSION, "files": files}, file)
            _to_disk(file)
        _sync_folder(staging)
        staging.rename(target)
        _sync_folder(target.parent)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> Any:
        verify_checkpoint(Path(path))
        location = "cpu" if map_location is None else map_location
        return torch.load(Path(path) / _STATE, map_location=location, weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        shutil.rmtree(path)


class Checkpoints(Callback):
    """Saves every so many optimizer steps and at the end, keeps the newest, restores the RNGs."""

    def __init__(self, folder: Path, every_n_steps: int, keep: int) -> None:
        if every_n_steps < 1 or keep < 2:
            raise ValueError(
                f"checkpoint_every={every_n_steps}, keep_checkpoints={keep}: at least 1 and 2, "
                "since the newest may be damaged"
            )
        self._folder, self._every, self._keep = folder, every_n_steps, keep
        self._rng: dict[str, Any] | None = None

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        boundary = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        every = int(trainer.val_check_batch or 0)
        validates = every > 0 and (batch_idx + 1) % every == 0  # then the save comes after it
        if boundary and not validates and trainer.global_step % self._every == 0:
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.state.fn == "fit" and trainer.global_step % self._every == 0:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Save the step just finished, unless that has been done, and drop the oldest."""
        path = self._folder / f"step-{trainer.global_step:08d}"
        if path.exists():
            return
        for logger in trainer.loggers:
            if hasattr(logger, "flush"):
                logger.flush()  # a resume at this step must find this step's metrics
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            for old in complete_checkpoints(self._folder)[: -self._keep]:
                shutil.rmtree(old)

    def on_save_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["rng"] = {"torch": torch.get_rng_state(), "python": random.getstate()}
        if torch.cuda.is_available():
            checkpoint["rng"]["cuda"] = torch.cuda.get_rng_state()

    def on_load_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._rng = checkpoint["rng"]

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self._rng is not None:
            torch.set_rng_state(self._rng["torch"])
            random.setstate(self._rng["python"])
            if "cuda" in self._rng:
                torch.cuda.set_rng_state(self._rng["cuda"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """A file's name is durable only once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
