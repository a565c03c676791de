"""Faults at the n-th file call of a process: scripts/faults.c as Python has it.

with_shim()                       # first of all: this program again, with the library loaded
block = Block.make(path, folder)  # calls below `folder` are counted, once a process is attached
block.arm(Fault("kill within", 17))
"""

import ctypes
import errno
import mmap
import os
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("faults.c")
_FIELDS = ("calls", "first", "last", "action", "error", "done", "always", "clock")
_SIZE = len(_FIELDS) * 8 + 512
# what of scripts/faults.c's enum, and of which errno
ACTIONS = {
    "kill before": (1, 0), "kill within": (2, 0), "kill after": (3, 0),
    "ENOSPC": (4, errno.ENOSPC), "EIO": (4, errno.EIO), "short write": (5, 0),
}  # fmt: skip
KILLS = tuple(name for name in ACTIONS if name.startswith("kill"))
FOR_A_WHILE = 12  # calls that a full disk lasts


@dataclass(frozen=True)
class Fault:
    """What is done at which file call, from 1."""

    name: str
    call: int

    def __str__(self) -> str:
        return f"{self.name} at file call {self.call}"


class Block:
    """Memory shared with the processes that attach to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _SIZE)

    @classmethod
    def make(cls, path: Path, folder: Path) -> "Block":
        """For calls below `folder`; `path` is not."""
        name = f"{folder}/".encode()
        path.write_bytes(bytes(8 * len(_FIELDS)) + name + bytes(512 - len(name)))
        return cls(path)

    def get(self, field: str) -> int:
        """One of its numbers."""
        (value,) = struct.unpack_from("q", self._memory, 8 * _FIELDS.index(field))
        return int(value)

    def set(self, **values: int) -> None:
        """Some of its numbers."""
        for field, value in values.items():
            struct.pack_into("q", self._memory, 8 * _FIELDS.index(field), value)

    def arm(self, fault: Fault) -> None:
        """From the next call on, which is the first."""
        action, error = ACTIONS[fault.name]
        last = fault.call + (FOR_A_WHILE if fault.name == "ENOSPC" else 0)
        self.set(calls=0, done=0, first=fault.call, last=last, action=action, error=error)

    def attach(self) -> None:
        """This process, and what it starts."""
        os.environ["FAULTS_BLOCK"] = str(self.path)
        ctypes.CDLL(None).faults_attach(str(self.path).encode())


def with_shim() -> None:
    """Replace this process by itself with the library loaded, unless it is."""
    if "FAULTS_LIBRARY" in os.environ:
        return
    library = Path(tempfile.mkdtemp(prefix="faults-")) / "faults.so"
    compiler = os.environ.get("CC", "cc")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", str(SOURCE), "-o", str(library), "-ldl"], check=True
    )
    environment = {"LD_PRELOAD": str(library), "FAULTS_LIBRARY": str(library)}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | environment)
