"""Inputs are what they were, and are read as what they are: by content, each once, to the end."""

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable, Iterator
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data import chunks, files, packing
from data.files import find_files
from data.prepare import prepare
from data.request import PrepareRequest
from data.shards import Manifest, TokenShards
from data.vocabulary import EOS, Vocabulary, byte_vocabulary

WORDS = [f"document {index}: " + "low bit " * 30 + "\n" for index in range(12)]


def of(*text: Path | str, **arguments: Any) -> PrepareRequest:
    defaults: dict[str, Any] = {"tokenizer": "bytes", "val_fraction": 0}
    return PrepareRequest(text=tuple(map(str, text)), **defaults | arguments)


def documents(folder: Path) -> list[str]:
    manifest = Manifest.load(folder)
    vocabulary = Vocabulary((folder / "tokenizer.json").read_text(), manifest.eos_id)
    tokens = TokenShards(folder, manifest, "train")
    return vocabulary.decode(tokens.read(0, len(tokens)).tolist()).split(EOS)[:-1]


def refused(out: Path, request: PrepareRequest, message: str) -> None:
    """In one line, with nothing left behind where there was nothing."""
    before = sorted(out.iterdir()) if out.exists() else None
    with pytest.raises((ValueError, OSError), match=message) as error:
        prepare(out, request)
    assert "\n" not in str(error.value)
    assert (sorted(out.iterdir()) if out.exists() else None) == before


def jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


@pytest.fixture
def source(tmp_path: Path) -> dict[str, tuple[Path, PrepareRequest]]:
    """By kind: the file to change, and the request that reads it."""
    rows = jsonl(tmp_path / "rows.jsonl", WORDS)
    plain = tmp_path / "plain.txt"
    plain.write_text("".join(WORDS))
    table = tmp_path / "table.parquet"
    pq.write_table(pa.table({"text": WORDS}), table)
    packed = tmp_path / "packed.txt.gz"
    packed.write_bytes(gzip.compress("".join(WORDS).encode(), compresslevel=0, mtime=0))
    tokenizer = tmp_path / "tokenizer" / "tokenizer.json"
    tokenizer.parent.mkdir()
    tokenizer.write_text(byte_vocabulary().json)
    dataset = jsonl(tmp_path / "dataset" / "train.jsonl", WORDS)
    parts = {"tokenizer": "bytes", "val_fraction": 0}
    return {
        "jsonl": (rows, of(rows)),
        "txt": (plain, of(plain, sample_by="line")),
        "parquet": (table, of(table)),
        "txt.gz": (packed, of(packed)),
        "tokenizer.json": (tokenizer, of(rows, tokenizer=str(tokenizer))),
        "dataset": (dataset, PrepareRequest(dataset=str(dataset.parent), **parts)),  # type: ignore[arg-type]
    }


def change(path: Path) -> None:
    """Another content of the same size, times set back as a copy would."""
    before, status = path.read_bytes(), path.stat()
    place = before.rindex(b"low") if b"low" in before else len(before) // 2
    path.write_bytes(before[:place] + b"new" + before[place + 3 :])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size


KINDS = ["jsonl", "txt", "parquet", "txt.gz", "tokenizer.json", "dataset"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_complete_folder_knows_its_inputs(
    tmp_path: Path, source: dict[str, tuple[Path, PrepareRequest]], kind: str
) -> None:
    path, request = source[kind]
    manifest = prepare(tmp_path / "out", request)
    assert (manifest.inputs or {})[str(path)] == files.digest(path)
    path.touch()  # the content decides
    assert prepare(tmp_path / "out", request) == manifest
    change(path)
    refused(tmp_path / "out", request, rf"other files \(.*{path.name} changed\)")


class KilledError(Exception):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_call_does_not_go_on_with_other_inputs(
    tmp_path: Path,
    source: dict[str, tuple[Path, PrepareRequest]],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_CHARACTERS", 300)
    monkeypatch.setattr(packing, "PIECE_CHARACTERS", 200)
    monkeypatch.setattr(packing, "COMMIT_SECONDS", 0)
    tokenized = packing.tokenized

    def killed(*arguments: Any) -> Iterator[Any]:
        for number, result in enumerate(tokenized(*arguments)):
            if number == 3:
                raise KilledError
            yield result

    path, request = source[kind]
    monkeypatch.setattr(packing, "tokenized", killed)
    with pytest.raises(KilledError):
        prepare(tmp_path / "out", request)
    monkeypatch.setattr(packing, "tokenized", tokenized)
    before = path.read_bytes()
    change(path)
    refused(tmp_path / "out", request, rf"other files \(.*{path.name} changed\)")
    if kind in ("tokenizer.json", "dataset"):  # whose content was known from the start
        path.write_bytes(before)
        prepare(tmp_path / "out", request)


def test_what_nothing_was_made_of_is_begun_anew(
    tmp_path: Path, source: dict[str, tuple[Path, PrepareRequest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, request = source["jsonl"]

    def killed(*_: Any) -> Any:
        raise KilledError

    monkeypatch.setattr(packing, "tokenized", killed)
    with pytest.raises(KilledError):
        prepare(tmp_path / "out", request)
    monkeypatch.undo()
    change(path)
    prepare(tmp_path / "out", request)
    assert "new bit" in documents(tmp_path / "out")[-1]


def test_text_that_changes_while_it_is_read_is_no_corpus(
    tmp_path: Path, source: dict[str, tuple[Path, PrepareRequest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, request = source["txt"]
    tokenized = packing.tokenized

    def changed(*arguments: Any) -> Iterator[Any]:
        yield from tokenized(*arguments)
        change(path)

    monkeypatch.setattr(packing, "tokenized", changed)
    refused(tmp_path / "out", request, "plain.txt changed")


@pytest.mark.parametrize("kind", ["jsonl", "dataset", "tokenizer.json"])
def test_a_file_more_or_less_is_named(
    tmp_path: Path, source: dict[str, tuple[Path, PrepareRequest]], kind: str
) -> None:
    path, request = source[kind]
    if kind == "jsonl":
        request = of(path.parent / "*.jsonl")
    elif kind == "tokenizer.json":
        request = of(path.parent.parent / "rows.jsonl", tokenizer=str(path), eos=EOS)
    prepare(tmp_path / "out", request)
    if kind == "tokenizer.json":
        path.rename(path.with_name("other.json"))
        refused(tmp_path / "out", request, r"tokenizer\.json is gone")
    else:
        jsonl(path.with_name("more.jsonl"), WORDS)
        refused(tmp_path / "out", request, r"more\.jsonl is new")


def test_a_manifest_of_before_still_tells_other_names_and_sizes(
    tmp_path: Path, source: dict[str, tuple[Path, PrepareRequest]]
) -> None:
    path, request = source["jsonl"]
    manifest = prepare(tmp_path / "out", request)
    record = json.loads((tmp_path / "out" / "manifest.json").read_text())
    for key in ("inputs", "lost_characters", "checksum"):
        del record[key]
    record["arguments"] |= request.listing()
    from data.shards import _digest

    text = json.dumps(record | {"checksum": _digest(record)})
    (tmp_path / "out" / "manifest.json").write_text(text)
    old = prepare(tmp_path / "out", request)
    assert old.inputs is None and old.fingerprint == manifest.fingerprint
    path.write_text(path.read_text() + '{"text": "more"}\n')
    refused(tmp_path / "out", request, "files_sha256 was")


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_compressed_text(tmp_path: Path, suffix: str, name: str) -> None:
    plain = "".join(WORDS) if name == "a.txt" else jsonl(tmp_path / name, WORDS).read_text()
    packed = PACKERS[suffix](plain.encode())
    path = tmp_path / f"{name}.{suffix}"
    path.write_bytes(packed)
    prepare(tmp_path / "out", of(path))
    assert documents(tmp_path / "out") == (["".join(WORDS)] if name == "a.txt" else WORDS)
    path.write_bytes(packed[: len(packed) // 2])
    refused(tmp_path / "cut", of(path), f"{path.name} cannot be read")


@pytest.mark.parametrize(
    "name", ["a[1].jsonl", "what?.jsonl", "star*.jsonl", "wei[rd]/s p/a.jsonl"]
)
def test_a_path_that_exists_is_taken_as_it_is(tmp_path: Path, name: str) -> None:
    first, other = jsonl(tmp_path / name, WORDS[:3]), jsonl(tmp_path / "b.jsonl", WORDS[3:5])
    prepare(tmp_path / "out", of(first, other))
    assert sorted(documents(tmp_path / "out")) == WORDS[:5]


def test_a_file_is_read_once_by_whatever_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = jsonl(tmp_path / "a" / "t.jsonl", WORDS)
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    (tmp_path / "z.jsonl").symlink_to(file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("a/t.jsonl", file, "z.jsonl", "a/../a/t.jsonl", "~/a/t.jsonl")
    assert find_files(map(str, names)) == [Path("a/t.jsonl")]
    assert find_files(["**/*.jsonl"]) == [Path("a/t.jsonl")]
    prepare("~/out", of("**/*.jsonl"))
    assert documents(tmp_path / "out") == WORDS and not (tmp_path / "~").exists()


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    text = "".join(WORDS) if ".txt" in name else jsonl(tmp_path / name, WORDS).read_text()
    content = text.encode("utf-8-sig")
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    prepare(tmp_path / "out", of(tmp_path / name))
    assert "".join(documents(tmp_path / "out")) == "".join(WORDS)


@pytest.mark.parametrize(
    ("content", "field"),
    [
        (
            '{"text": "a"}\n' + '{"other": null, "text": "b"}\n' * 3 + '{"x": "y", "text": "c"}',
            "text",
        ),
        ('{"a": null, "text": "a"}\n' * 9 + '{"a": "late", "text": "c"}', "text"),
        ('{"data": {"text": "a"}}\n{"data": {"text": "b", "more": 1}}\n', "data.text"),
        ('{"data.text": "a", "data": 3}\n', "data.text"),
        ('[{"text": "a"},\n {"text": "b"}]\n', "text"),
    ],
)
def test_rows_of_any_schema(tmp_path: Path, content: str, field: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    prepare(tmp_path / "out", of(path, text_field=field))
    rows = json.loads(content) if content[0] == "[" else map(json.loads, content.splitlines())
    expected = [row[field] if field in row else row["data"]["text"] for row in rows]
    assert documents(tmp_path / "out") == expected


def test_a_nested_column_of_parquet(tmp_path: Path) -> None:
    rows = [{"data": {"text": text, "n": 1}, "text": "other"} for text in WORDS]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=5)
    prepare(tmp_path / "out", of(tmp_path / "a.parquet", text_field="data.text"))
    assert documents(tmp_path / "out") == WORDS


BOMBS: dict[str, tuple[str, bytes, str]] = {
    "deep list": ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"]" * 100_000, "nested too deep"),
    "deep object": ("a.jsonl", b'{"a":' * 50_000, "nested too deep"),
    "deep array": ("a.json", b"[" * 100_000, "nested too deep"),
    "long row": ("a.jsonl.gz", gzip.compress(b'{"text": "' + b"a" * 2**20 + b'"}'), "more than"),
    "long line": ("a.txt.xz", lzma.compress(b"a" * 2**20), "more than"),
    "half a pair": ("a.jsonl", b'{"text": "\\ud800"}', "half a surrogate pair"),
    "empty": ("zero.jsonl", b"", r"zero\.jsonl is empty"),
    "no row": ("a.jsonl", b"3\n", "a row is int"),
}  # fmt: skip


@pytest.mark.parametrize("case", BOMBS)
def test_bombs_are_refused(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_LINE", 2**18)
    name, content, message = BOMBS[case]
    (tmp_path / name).write_bytes(content)
    sample_by = "line" if ".txt" in name else None
    refused(tmp_path / "out", of(tmp_path / name, sample_by=sample_by), message)


@pytest.mark.parametrize("sample_by", ["document", "line", "paragraph"])
def test_one_document_cannot_be_split(
    tmp_path: Path, sample_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known before any of it is tokenized."""
    (tmp_path / "one.txt").write_text("a" * 300_000)
    monkeypatch.setattr(packing, "tokenized", lambda *_: pytest.fail("tokenized"))
    request = of(tmp_path / "one.txt", sample_by=sample_by, val_fraction=0.1)
    refused(tmp_path / "out", request, "1 documents with text cannot be split")


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    refused(tmp_path / "out", of(tmp_path), "is a folder: name its files")


def test_a_folder_of_others_is_never_touched(tmp_path: Path) -> None:
    text = jsonl(tmp_path / "a.jsonl", WORDS)
    for name in ("tokenizer.json", "train-00000.npy", "notes.json.tmp", "config.yaml"):
        out = tmp_path / f"of-{name}"
        out.mkdir()
        (out / name).write_text("mine")
        refused(out, of(text), "holds other files")
        assert (out / name).read_text() == "mine"


def bpe(path: Path, alphabet: str, **options: Any) -> str:
    vocab = {char: index for index, char in enumerate([EOS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], **options))
    if "dropout" not in options:
        tokenizer.decoder = decoders.Fuse()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer.save(str(path))
    return str(path)


LATIN = "abcdefghijklmnopqrstuvwxyz 0123456789:\n"


@pytest.mark.parametrize("unknown", [{}, {"unk_token": EOS}, {"unk_token": "z"}])
def test_characters_that_a_tokenizer_cannot_give_back(
    tmp_path: Path, unknown: dict[str, str]
) -> None:
    tokenizer = bpe(tmp_path / "tokenizer.json", LATIN, **unknown)
    russian = jsonl(tmp_path / "ru.jsonl", ["низкая точность " * 20] * 3)
    message = "does not give back|holds the end of a document"
    refused(tmp_path / "out", of(russian, tokenizer=tokenizer), message)
    few = jsonl(tmp_path / "few.jsonl", [*WORDS, "naïve"])
    if unknown.get("unk_token") == EOS:
        refused(tmp_path / "out", of(few, tokenizer=tokenizer), "holds the end of a document")
        return
    manifest = prepare(tmp_path / "out", of(few, tokenizer=tokenizer))
    assert manifest.lost_characters == {"ï": 1}
    assert "1 characters the tokenizer does not give back ('ï')" in manifest.summary()


@pytest.mark.parametrize("eos", ["a", "o", " "])
def test_an_end_that_is_text_is_refused(tmp_path: Path, eos: str) -> None:
    tokenizer = bpe(tmp_path / "tokenizer.json", LATIN)
    text = jsonl(tmp_path / "a.jsonl", ["a boat"] * 53)
    request = of(text, tokenizer=tokenizer, eos=eos)
    refused(tmp_path / "out", request, f"holds the end of a document, {eos!r}")


@pytest.mark.parametrize("dropout", [0.1, 1.0, 1e-4])
def test_a_tokenizer_that_draws_at_random_is_refused(tmp_path: Path, dropout: float) -> None:
    tokenizer = bpe(tmp_path / "tokenizer.json", LATIN, dropout=dropout)
    text = jsonl(tmp_path / "a.jsonl", WORDS)
    refused(tmp_path / "out", of(text, tokenizer=tokenizer), "draws at random")


@pytest.mark.parametrize("other", ["validation", "test"])
def test_splits_of_a_dataset_that_are_not_read_are_named(
    tmp_path: Path, other: str, capfd: pytest.CaptureFixture[str]
) -> None:
    train = jsonl(tmp_path / "set" / "train.jsonl", WORDS)
    jsonl(tmp_path / "set" / f"{other}.jsonl", ["held out"])
    request = PrepareRequest(
        dataset=str(train.parent), tokenizer="bytes", val_fraction=0, streaming=True
    )
    prepare(tmp_path / "out", request)
    assert f"also has ['{other}'], not read" in capfd.readouterr().err
    assert documents(tmp_path / "out") == WORDS


@pytest.mark.slow
def test_a_killed_worker_is_one_line() -> None:
    def killing() -> Iterator[chunks.Chunk]:
        for _ in range(20):
            yield chunks.Chunk([chunks.Piece("text", "train", True)])
            for process in active_children():
                process.kill()

    with pytest.raises(OSError, match="a worker process was ended from outside") as error:
        list(packing.tokenized(killing(), byte_vocabulary(), 2))
    assert "\n" not in str(error.value)
