"""One job a run folder: a lock that ends with the process that holds it, however it ends."""

import errno
import fcntl
import os
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO


class RunLock:
    """Held from `acquire` until the end of the `with` block or of the process.

    A record lock: the kernel drops it with the process, so none is ever stale, and workers that are
    forked later do not keep it. The file's text only says who holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "lock"
        self._file: IO[str] | None = None

    @property
    def held(self) -> bool:
        """By this process."""
        return self._file is not None

    def acquire(self) -> None:
        """Raise BlockingIOError, naming host and process, if another job holds the folder."""
        if self._file is not None:
            return
        file = self._path.open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                file.close()
                raise OSError(
                    f"{self._path.parent} lies on a file system without locks ({error.strerror}), "
                    "where two jobs could write one run: choose a run_dir elsewhere"
                ) from None
            file.seek(0)
            holder = file.read().strip() or "a process that has not said its name yet"
            file.close()
            raise BlockingIOError(
                f"{self._path.parent} is in use by {holder}: two jobs cannot write one run folder"
            ) from None
        file.truncate(0)
        file.write(f"{socket.gethostname()}, process {os.getpid()}\n")
        file.flush()
        self._file = file

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def release(self) -> None:
        """Let another job have the folder."""
        if self._file is not None:
            self._file.close()
            self._file = None


def holder(folder: Path) -> str | None:
    """Who holds the folder's lock, asked without taking it; None: nobody (or no Linux to ask)."""
    path = folder / "lock"
    if sys.platform != "linux" or not path.exists():
        return None
    with path.open("rb+") as file:
        flock = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind = struct.unpack("hhqqi", fcntl.fcntl(file, fcntl.F_GETLK, flock))[0]
        return None if kind == fcntl.F_UNLCK else file.read().decode().strip()


@contextmanager
def held(file: Path) -> Iterator[None]:
    """Within it no other process or thread is within it for the same file: they wait."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
