"""Names and paths from configurations: what may become part of a path."""

import re
from pathlib import Path

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,63}")


def checked_name(name: str) -> str:
    """A name that is one component of a path, and nothing else."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"the name {name!r} becomes a folder: 1 to 64 of the letters A-Z a-z 0-9 . _ + = -, "
            "the first a letter or digit"
        )
    return name


def checked_run_dir(run_dir: str) -> Path:
    """The folder as written: nothing in it climbs, and TensorBoard expands nothing in it."""
    path = Path(run_dir)
    if ".." in path.parts or "$" in run_dir or run_dir.startswith("~"):
        raise ValueError(f"run_dir={run_dir!r}: `..`, `$` and `~` are not allowed in it")
    return path
