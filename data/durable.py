"""Files that are either the old or the new one, whatever is killed when."""

import os
from pathlib import Path


def write_durably(path: Path, text: str) -> None:
    """Replace `path` in one step, on disk before the call returns; OSError that names it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise unwritten(path, error) from error


def unwritten(path: Path, error: OSError) -> OSError:
    """The same error with the file in its words, which a full disk's does not have."""
    return OSError(f"{path} cannot be written: {error.strerror or error}")


def sync_folder(folder: Path) -> None:
    """Make the folder's entries durable: fsync of a file does not cover its name."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
