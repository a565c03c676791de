"""What a result was made by: versions, machine, commit, command."""

import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

_PACKAGES = ("lowbit", "torch", "lightning", "transformers", "datasets", "tokenizers")


def code_origin() -> dict[str, Any]:
    """Versions, machine and commit."""
    versions = {"python": platform.python_version()} | {p: version(p) for p in _PACKAGES}
    return {"versions": versions, "machine": platform.machine(), "commit": _commit()}


def _commit() -> str | None:
    """The checkout's commit, where there is one."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here), "rev-parse", "HEAD"]
    result = subprocess.run(git, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else None


def command_line() -> list[str]:
    """The command as it was typed."""
    return ["lowbit", *sys.argv[1:]]
