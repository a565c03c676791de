"""The durable state of an unfinished preparation: how much of its files may be trusted."""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.chunks import Position
from data.durable import write_durably
from data.shards import SPLITS, SplitName
from data.writer import SplitProgress

_FILE = "progress.json"


@dataclass
class Journal:
    """Written after the files it speaks of are on disk; whatever they hold beyond it is cut off."""

    arguments: dict[str, Any]
    eos_id: int | None = None  # None until tokenizer.json is there
    position: Position = field(default_factory=Position)
    text_bytes: int = 0
    empty_documents: int = 0
    splits: dict[SplitName, SplitProgress] = field(
        default_factory=lambda: {name: SplitProgress() for name in SPLITS}
    )

    @classmethod
    def open(cls, folder: Path, arguments: dict[str, Any]) -> "Journal":
        """The journal of `folder`, or a new one in a folder that holds nothing but leftovers."""
        path = folder / _FILE
        if not path.exists():
            _clear(folder)
            return cls(arguments)
        record = json.loads(path.read_text(encoding="utf-8"))
        refuse_difference(folder, record["arguments"], arguments)
        position = Position(**record.pop("position"))
        splits = {name: SplitProgress.from_record(record["splits"][name]) for name in SPLITS}
        return cls(**record | {"position": position, "splits": splits})

    def save(self, folder: Path) -> None:
        """Durable when it returns."""
        write_durably(folder / _FILE, json.dumps(asdict(self)))

    @staticmethod
    def remove(folder: Path) -> None:
        """The preparation is done."""
        for path in folder.glob(f"{_FILE}*"):  # and what a kill left of its writing
            path.unlink()

    @staticmethod
    def abandon(folder: Path) -> None:
        """After bad input: leave nothing, unless there is something to go on from."""
        if not (folder / _FILE).exists():
            _clear(folder)
            folder.rmdir()


def refuse_difference(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise if `folder` was begun with other arguments."""
    differences = [
        f"{key} was {old.get(key)!r}, is {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if differences:
        raise ValueError(
            f"{folder} was prepared with other arguments ({'; '.join(differences)}): "
            "choose another folder or delete this one"
        )


def _clear(folder: Path) -> None:
    """Remove what a preparation killed before its first commit left; refuse what is not its own."""
    own = re.compile(r"(train|val)-\d{5,}\.npy|tokenizer\.json|.+\.json\.tmp")
    files = list(folder.iterdir())
    if foreign := sorted(file.name for file in files if not own.fullmatch(file.name)):
        raise ValueError(f"{folder} holds other files, expected a new folder: {foreign[:3]}")
    for file in files:
        file.unlink()
