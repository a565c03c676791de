"""Where documents come from: sequences of texts that can be taken up again at a position."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

BLOCK_CHARACTERS = 2**16
_BATCH_ROWS = 100
SampleBy = Literal["document", "paragraph", "line"]


class Source(Protocol):
    """Documents in a fixed order, each an iterator of blocks of text, read as it is consumed."""

    @property
    def num_documents(self) -> int | None:
        """None where only reading would tell."""

    @property
    def num_bytes(self) -> int | None:
        """Of UTF-8 text, roughly: for the progress bar alone."""

    def documents(self, state: Any) -> Iterator[Iterator[str]]:
        """The documents from `state` on; None is the beginning."""
        ...

    def state(self) -> Any:
        """Plain data for `documents`: the position after the document yielded last."""
        ...


class ListSource:
    """Documents held in memory: the named corpora."""

    def __init__(self, documents: list[str]) -> None:
        self._documents = documents
        self._next = 0
        self.num_documents = len(documents)
        self.num_bytes = sum(len(document.encode()) for document in documents)

    def documents(self, state: Any) -> Iterator[Iterator[str]]:
        for index in range(state or 0, len(self._documents)):
            self._next = index + 1
            yield iter([self._documents[index]])

    def state(self) -> int:
        """What goes on from here: plain data."""
        return self._next


class TextSource:
    """UTF-8 text files: a document is a file, or a paragraph or a line of one."""

    def __init__(self, paths: list[Path], sample_by: SampleBy) -> None:
        self._paths = paths
        self._sample_by = sample_by
        self._state = [0, 0]  # file, documents of it that are done
        self.num_documents = len(paths) if sample_by == "document" else None
        self.num_bytes = sum(path.stat().st_size for path in paths)

    def documents(self, state: Any) -> Iterator[Iterator[str]]:
        first_file, done = state or (0, 0)
        for index in range(first_file, len(self._paths)):
            for number, document in enumerate(self._split(self._paths[index]), start=1):
                if index > first_file or number > done:
                    self._state = [index, number]
                    yield document

    def state(self) -> list[int]:
        """What goes on from here: plain data."""
        return list(self._state)

    def _split(self, path: Path) -> Iterator[Iterator[str]]:
        match self._sample_by:
            case "document":
                yield _blocks(path)
            case "line":
                yield from (iter([line]) for line in _lines(path))
            case "paragraph":
                yield from (iter([paragraph]) for paragraph in _paragraphs(path))


def _blocks(path: Path) -> Iterator[str]:
    # newline="": line ends stay as they are, so that decoding gives the file back.
    with path.open(encoding="utf-8", newline="") as file:
        try:
            while block := file.read(BLOCK_CHARACTERS):
                yield block
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error.reason}") from error


def _lines(path: Path) -> Iterator[str]:
    rest = ""
    for block in _blocks(path):
        *lines, rest = (rest + block).split("\n")
        yield from (line + "\n" for line in lines)
    if rest:
        yield rest


def _paragraphs(path: Path) -> Iterator[str]:
    lines: list[str] = []
    for line in _lines(path):
        if line.strip():
            lines.append(line)
        elif lines:
            yield "".join(lines)
            lines = []
    if lines:
        yield "".join(lines)


class TableSource:
    """Rows of a streaming `datasets` dataset, one text field each."""

    def __init__(
        self, open_dataset: Callable[[], Any], text_field: str, name: str, num_bytes: int | None
    ) -> None:
        self._open = open_dataset
        self._text_field = text_field
        self._state: list[Any] = []
        self._name = name
        self.num_documents = None
        self.num_bytes = num_bytes

    def documents(self, state: Any) -> Iterator[Iterator[str]]:
        try:
            dataset = self._open().with_format("arrow")  # afresh: it keeps the state it was given
            dataset_state, done = state or (dataset.state_dict(), 0)
            dataset.load_state_dict(dataset_state)
            for rows in dataset.iter(batch_size=_BATCH_ROWS):  # 30 times as fast as row by row
                for number, text in enumerate(self._texts(rows), start=1):
                    if number > done:
                        self._state = [dataset_state, number]
                        yield iter([text])
                done = max(done - len(rows), 0)
                dataset_state = dataset.state_dict()
        except Exception as error:  # what a broken file raises depends on its format
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"{self._name} cannot be read: {reason}") from error

    def state(self) -> list[Any]:
        """What goes on from here: plain data."""
        return self._state

    def _texts(self, rows: Any) -> list[str]:
        if self._text_field not in rows.column_names:
            raise ValueError(f"no field {self._text_field!r} in rows of {rows.column_names}")
        texts: list[str] = rows.column(self._text_field).to_pylist()
        for text in texts:
            if not isinstance(text, str):
                kind = type(text).__name__
                raise ValueError(f"field {self._text_field!r} of a row is {kind}, expected text")
        return texts
