"""The durable state of an unfinished preparation: how much of its files may be trusted."""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict, cast

from data.chunks import Position
from data.durable import write_durably
from data.files import digest
from data.plain import as_type, read_json, sealed, unsealed
from data.shards import SPLITS, SplitName
from data.verify import Stamp, refuse_changes, stamps_of
from data.writer import SplitProgress

_FILE = "progress.json"


@dataclass
class Journal:
    """Written after the files it speaks of are on disk; whatever they hold beyond it is cut off.

    It is also the first file of a preparation: what makes a folder ours.
    """

    arguments: dict[str, Any]
    eos_id: int | None = None  # None until tokenizer.json is there
    position: Position = field(default_factory=Position)
    stamps: dict[str, Stamp] = field(default_factory=dict)  # of all inputs, when it began
    sha256: dict[str, str] = field(default_factory=dict)  # of those read to their ends
    lost: dict[str, int] = field(default_factory=dict)  # characters that no id gives back
    text_bytes: int = 0
    empty_documents: int = 0
    splits: dict[SplitName, SplitProgress] = field(
        default_factory=lambda: {name: SplitProgress() for name in SPLITS}
    )

    @classmethod
    def open(cls, folder: Path, arguments: dict[str, Any], inputs: "InputFiles") -> "Journal":
        """The journal of `folder`; a new one where nothing was committed, or in an empty folder."""
        record = _read(folder)
        if record is None or not record["text_bytes"]:
            _clear(folder, ours=record is not None)
            journal = cls(arguments, stamps=stamps_of(inputs.all))
            journal.sha256 = {str(path): digest(path) for path in inputs.aside}
            journal.save(folder)
            return journal
        if "stamps" not in record:
            raise ValueError(f"{folder} was begun by an earlier version: delete it to start anew")
        journal = cast(Journal, as_type(cls, record, str(folder / _FILE)))
        if journal.splits.keys() != {*SPLITS}:
            raise ValueError(f"{folder / _FILE} has splits {sorted(journal.splits)}")
        refuse_difference(folder, journal.arguments, arguments)
        known = {name: journal.sha256.get(name) for name in journal.stamps}
        refuse_changes(folder, known, journal.stamps, inputs.all)
        return journal

    def save(self, folder: Path) -> None:
        """Durable when it returns."""
        write_durably(folder / _FILE, json.dumps(sealed(asdict(self))))

    @staticmethod
    def remove(folder: Path) -> None:
        """The preparation is done."""
        for path in folder.glob(f"{_FILE}*"):  # and what a kill left of its writing
            path.unlink()

    @staticmethod
    def abandon(folder: Path) -> None:
        """After bad input: leave nothing, unless there is something to go on from."""
        record = _read(folder)
        if record is not None and not record["text_bytes"]:
            _clear(folder, ours=True)


@dataclass(frozen=True)
class InputFiles:
    """The files that decide a result: those read as text, and those read aside of it."""

    text: list[Path]
    aside: list[Path]  # of a tokenizer or a dataset: others open them

    @property
    def all(self) -> list[Path]:
        return [*self.text, *self.aside]


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / _FILE
    if not path.exists():
        return None
    try:
        found = as_type(_Begun, unsealed(read_json(path), path), str(path))
    except ValueError as error:
        raise ValueError(f"{error}; not a journal of `lowbit prepare`") from None
    return cast(dict[str, Any], found) if found["text_bytes"] is not None else None


class _Begun(TypedDict):
    text_bytes: int | None


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


def _clear(folder: Path, *, ours: bool) -> None:
    """Remove what a preparation killed before its first commit left; refuse what is not its own."""
    names = rf"{_FILE}(\.tmp)?"
    if ours:  # it was new or empty when we began
        names += r"|(train|val)-\d{5,}\.npy|(tokenizer|manifest)\.json(\.tmp)?"
    files = sorted(folder.iterdir(), key=lambda file: file.name == _FILE)  # our mark goes last
    if foreign := sorted(file.name for file in files if not re.fullmatch(names, file.name)):
        raise ValueError(f"{folder} holds other files, expected a new folder: {foreign[:3]}")
    for file in files:
        file.unlink()
