"""Folders of exports: staged beside their place, sealed with hashes, there as a whole or not."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train.checkpoints.folder import MANIFEST, DamagedCheckpointError, publish, read_manifest
from train.runs.folders import is_free


def read_mark(folder: Path) -> dict[str, Any] | None:
    """Layout, source and command that an export's manifest names; None for any other folder."""
    try:
        found: dict[str, Any] = read_manifest(folder)["origin"]
    except (DamagedCheckpointError, ValueError):
        return None
    return found if "layout" in found else None


def check_target(folder: Path) -> None:
    """FileExistsError unless `folder` is new, empty, or an export of ours and nothing besides."""
    if is_free(folder):
        return
    own: set[str] = set()
    if read_mark(folder) is not None:
        own = {MANIFEST, *read_manifest(folder)["files"]}
    if foreign := sorted(path.name for path in folder.iterdir() if path.name not in own):
        raise FileExistsError(
            f"{folder} holds other files ({', '.join(foreign[:3])}), expected a new or empty folder"
            " or an export"
        )


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A hidden empty folder beside `target`; what is left of it at the end is removed."""
    place = target.absolute().with_name(f".{target.name}.lowbit-export")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def seal(place: Path, files: Mapping[str, str], mark: Mapping[str, Any]) -> None:
    """Leave a manifest in a staged folder: our mark, and SHA-256 by file."""
    sealed = place.with_name(place.name + "-sealed")
    shutil.rmtree(sealed, ignore_errors=True)
    publish(place, sealed, dict(files), dict(mark))
    sealed.rename(place)


def put(place: Path, target: Path) -> None:
    """Give a sealed folder its name; an earlier export of that name goes."""
    old = place.with_name(place.name + "-old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    place.rename(target.absolute())
    shutil.rmtree(old, ignore_errors=True)
