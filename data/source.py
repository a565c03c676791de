"""Where documents come from: sequences of texts that can be taken up again at a position."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

from data.files import Report, read_lines, read_text
from data.rows import checked_text, column

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

    @property
    def sha256(self) -> dict[str, str]:
        """Of the files read to their ends so far, by name."""

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
        self.sha256: dict[str, str] = {}
        self.num_documents = len(documents)
        self.num_bytes = sum(len(document.encode()) for document in documents)

    def documents(self, state: Any) -> Iterator[Iterator[str]]:
        for index in range(state or 0, len(self._documents)):
            self._next = index + 1
            yield iter([self._documents[index]])

    def state(self) -> int:
        """What goes on from here: plain data."""
        return self._next


class FileSource:
    """The documents of files, one file after the other.

    `read` gives those of a file but for the first few, and reports its hash at its end.
    """

    def __init__(
        self,
        paths: list[Path],
        read: Callable[[Path, int, Report], Iterator[Iterator[str]]],
        num_documents: int | None,
        num_bytes: int | None,
    ) -> None:
        self._paths = paths
        self._read = read
        self._state = [0, 0]  # file, documents of it that are done
        self.num_documents = num_documents
        self.num_bytes = num_bytes
        self.sha256: dict[str, str] = {}

    def documents(self, state: Any) -> Iterator[Iterator[str]]:
        first_file, done = state or (0, 0)
        for index in range(first_file, len(self._paths)):
            skip = done if index == first_file else 0
            documents = self._read(self._paths[index], skip, self._report)
            for number, document in enumerate(documents, start=skip + 1):
                self._state = [index, number]
                yield document

    def state(self) -> list[int]:
        """What goes on from here: plain data."""
        return list(self._state)

    def _report(self, path: Path, sha256: str) -> None:
        if self.sha256.setdefault(str(path), sha256) != sha256:
            raise ValueError(f"{path} changed while it was read")


def text_documents(
    path: Path, skip: int, report: Report, sample_by: SampleBy
) -> Iterator[Iterator[str]]:
    """UTF-8 text: a document is the file, or a paragraph or a line of it."""
    match sample_by:
        case "document":
            if not skip:
                yield read_text(path, report)
            return
        case "line":
            texts = read_lines(path, report)
        case "paragraph":
            texts = _paragraphs(path, report)
    for number, text in enumerate(texts):
        if number >= skip:
            yield iter([text])


def _paragraphs(path: Path, report: Report) -> Iterator[str]:
    lines: list[str] = []
    for line in read_lines(path, report):
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
        self.sha256: dict[str, str] = {}
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
            reason = reason.removeprefix(f"{self._name} cannot be read: ")
            raise ValueError(f"{self._name} cannot be read: {reason}") from error

    def state(self) -> list[Any]:
        """What goes on from here: plain data."""
        return self._state

    def _texts(self, rows: Any) -> list[str]:
        return [
            checked_text(self._name, value, self._text_field)
            for value in column(rows, self._text_field)
        ]
