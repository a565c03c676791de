"""stopping.json: which seeds of a sweep told how many there would be (`--target-se`)."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from data.durable import write_durably
from data.plain import read_as, sealed

FILE = "stopping.json"


@dataclass(frozen=True)
class Stopping:
    """Stein's two stages: the spread of the gaps is that of the seeds `first` alone."""

    target_se: float
    first: tuple[int, ...]


def write_stopping(folder: Path, stopping: Stopping) -> None:
    """Beside the run folders; what an earlier call wrote stays, for it was the first stage."""
    folder.mkdir(parents=True, exist_ok=True)
    if read_stopping(folder) is None:
        write_durably(folder / FILE, json.dumps(sealed(asdict(stopping))) + "\n")


def read_stopping(folder: Path) -> Stopping | None:
    """What the sweep in `folder` was stopped by; None for one of a fixed size."""
    path = folder / FILE
    if not path.exists():
        return None
    return cast(Stopping, read_as(Stopping, path))
