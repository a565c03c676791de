"""Standard streams that outlast their reader: what nobody reads ends nothing."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Lasting(io.FileIO):
    """A descriptor that, once it cannot be written, leads nowhere; `error` says why."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # for libraries that write past us, too
            os.close(nowhere)
            return len(data)


@contextmanager
def lasting_streams() -> Iterator[dict[str, _Lasting]]:
    """Within, stdout and stderr never raise; those by name that a process owns."""
    before: dict[str, Any] = {"stdout": sys.stdout, "stderr": sys.stderr}
    own: dict[str, Any] = {"stdout": sys.__stdout__, "stderr": sys.__stderr__}
    raw: dict[str, _Lasting] = {}
    for name, stream in before.items():
        if stream is None or stream is not own[name]:
            continue  # closed, or a caller's capture
        stream.flush()
        raw[name] = _Lasting(stream.fileno(), "w", closefd=False)
        setattr(sys, name, io.TextIOWrapper(
            io.BufferedWriter(raw[name]), stream.encoding, stream.errors,
            line_buffering=name == "stderr" or stream.isatty(),
        ))  # fmt: skip
    try:
        yield raw
    finally:
        for name in raw:
            getattr(sys, name).flush()
            setattr(sys, name, before[name])
