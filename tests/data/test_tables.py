"""JSONL and parquet files, and whole datasets through the `datasets` library."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import chunks, packing
from data.prepare import prepare
from data.request import PrepareRequest
from data.shards import Manifest, TokenShards
from data.vocabulary import Vocabulary

ROWS = [{"id": index, "body": f"row {index} " + "text " * (index % 50)} for index in range(300)]
LINES = [json.dumps(row) + "\n" for row in ROWS]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The same rows as JSONL in two files, compressed, and as parquet."""
    folder = tmp_path / "rows"
    (folder / "jsonl").mkdir(parents=True)
    (folder / "jsonl" / "a.jsonl").write_text("".join(LINES[:140]))
    (folder / "jsonl" / "b.jsonl").write_text("".join(LINES[140:]))
    (folder / "all.jsonl.gz").write_bytes(gzip.compress("".join(LINES).encode()))
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "all.parquet", row_group_size=64)
    return folder


def request(*text: Path, **arguments: object) -> PrepareRequest:
    defaults: dict[str, object] = {"tokenizer": "bytes", "val_fraction": 0, "text_field": "body"}
    patterns = tuple(str(path) for path in text)
    return PrepareRequest(text=patterns, **defaults | arguments)  # type: ignore[arg-type]


def text_of(folder: Path) -> str:
    manifest = Manifest.load(folder)
    vocabulary = Vocabulary((folder / "tokenizer.json").read_text(), manifest.eos_id)
    tokens = TokenShards(folder, manifest, "train")
    return vocabulary.decode(tokens.read(0, len(tokens)).tolist())


EXPECTED = "".join(row["body"] + "<|endoftext|>" for row in ROWS)  # type: ignore[operator]


@pytest.mark.parametrize("pattern", ["jsonl/*.jsonl", "all.jsonl.gz", "all.parquet"])
def test_files_of_rows(tmp_path: Path, files: Path, pattern: str) -> None:
    prepare(tmp_path / "out", request(files / pattern))
    assert text_of(tmp_path / "out") == EXPECTED


@pytest.mark.parametrize("streaming", [True, False])
def test_a_dataset_by_name(
    tmp_path: Path, files: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder is the one name that needs no network; the path through the library is the same."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    name = str(files / "jsonl")
    arguments = {"tokenizer": "bytes", "val_fraction": 0, "text_field": "body", "split": "train"}
    prepare(tmp_path / "out", PrepareRequest(dataset=name, streaming=streaming, **arguments))  # type: ignore[arg-type]
    assert text_of(tmp_path / "out") == EXPECTED


class KilledError(Exception):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("pattern", ["jsonl/*.jsonl", "all.jsonl.gz", "all.parquet"])
def test_reading_goes_on_where_it_was_interrupted(
    tmp_path: Path, files: Path, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_CHARACTERS", 2000)
    monkeypatch.setattr(packing, "COMMIT_SECONDS", 0)
    tokenized, kills, texts = packing.tokenized, 0, 0

    def killed(*arguments: object) -> Iterator[object]:
        nonlocal texts
        for number, (chunk, tokens) in enumerate(tokenized(*arguments)):  # type: ignore[arg-type]
            if number == 3:
                raise KilledError
            texts += len(chunk.pieces)
            yield chunk, tokens

    monkeypatch.setattr(packing, "tokenized", killed)
    while not (tmp_path / "out" / "manifest.json").exists():
        try:
            prepare(tmp_path / "out", request(files / pattern))
        except KilledError:
            kills += 1
    assert kills > 3 and texts == len(ROWS)  # no row was tokenized twice
    assert text_of(tmp_path / "out") == EXPECTED


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.jsonl", "".join(LINES)[:-9].encode(), r"cut\.jsonl cannot be read: JSON parse error"),
        ("latin.jsonl", b'{"body": "caf\xe9"}\n', r"latin\.jsonl is not UTF-8 text"),
        ("empty.jsonl", b"", r"empty\.jsonl is empty"),
        ("null.jsonl", b'{"body": "a"}\n{"body": null}\n', "field 'body' of a row is NoneType"),
        ("other.jsonl", b'{"text": "a"}\n', r"no field 'body' in rows of \['text'\]"),
        ("number.jsonl", b'{"body": 3}\n', "field 'body' of a row is int"),
        ("cut.jsonl.gz", gzip.compress(b'{"body": "a"}\n', mtime=0)[:-9], "cannot be read"),
        ("cut.parquet", b"PAR1 and no more", r"cut\.parquet cannot be read: Parquet"),
        ("empty.parquet", b"", "cannot be read: Parquet file size is 0 bytes"),
    ],
)
def test_broken_rows_are_one_line(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
    content: bytes,
    message: str,
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        prepare(tmp_path / "out", request(tmp_path / name))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert capfd.readouterr().err == ""


def test_a_dataset_script_is_refused(tmp_path: Path) -> None:
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text("raise SystemExit('ran')\n")
    arguments = {"tokenizer": "bytes", "val_fraction": 0}
    with pytest.raises(ValueError, match="scripts are no longer supported"):
        prepare(tmp_path / "out", PrepareRequest(dataset=str(tmp_path / "script"), **arguments))  # type: ignore[arg-type]


def test_a_hub_that_cannot_be_reached_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def unreachable(*arguments: object, **options: object) -> None:
        raise ConnectionError("Couldn't reach 'some/corpus' on the Hub\nand more lines")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match="some/corpus cannot be read: Couldn't reach") as error:
        prepare(tmp_path / "out", PrepareRequest(dataset="some/corpus", tokenizer="bytes"))
    assert "\n" not in str(error.value)


def test_files_of_several_kinds_are_refused(tmp_path: Path, files: Path) -> None:
    (files / "plain.txt").write_text("a")
    with pytest.raises(ValueError, match="several kinds"):
        prepare(tmp_path / "out", request(files / "plain.txt", files / "all.parquet"))


def test_rows_are_not_split_further(tmp_path: Path, files: Path) -> None:
    with pytest.raises(ValueError, match="--sample-by does not apply to parquet"):
        prepare(tmp_path / "out", request(files / "all.parquet", sample_by="line"))
