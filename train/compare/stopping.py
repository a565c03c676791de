"""stopping.json: which seeds of a sweep told how many there would be (`--target-se`)."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

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
        (folder / FILE).write_text(json.dumps(asdict(stopping)) + "\n", encoding="utf-8")


def read_stopping(folder: Path) -> Stopping | None:
    """What the sweep in `folder` was stopped by; None for one of a fixed size."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        return Stopping(float(plain["target_se"]), tuple(map(int, plain["first"])))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not say how the sweep was stopped: {error}") from None
