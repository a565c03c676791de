"""`lowbit prepare`: the tokens are the documents, whatever happens on the way."""

import argparse
import filecmp
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from data import chunks, packing
from data.prepare import add_arguments, prepare, run
from data.request import PrepareRequest
from data.shards import Manifest
from data.vocabulary import Vocabulary

Make = Callable[..., PrepareRequest]


def documents_of(folder: Path, split: str) -> list[str]:
    """What the shards of a split say, one text per document."""
    manifest = Manifest.load(folder)
    vocabulary = Vocabulary((folder / "tokenizer.json").read_text(), manifest.eos_id)
    arrays = [np.load(path) for path in sorted(folder.glob(f"{split}-*.npy"))]
    ids = np.concatenate(arrays)
    ends = np.flatnonzero(ids == manifest.eos_id)
    assert ends[-1] == len(ids) - 1
    return [vocabulary.decode(part[:-1].tolist()) for part in np.split(ids, ends + 1)[:-1]]


def same_files(left: Path, right: Path) -> bool:
    names = sorted(path.name for path in left.iterdir())
    assert names == sorted(path.name for path in right.iterdir())
    return filecmp.cmpfiles(left, right, names, shallow=False) == (names, [], [])


@pytest.mark.parametrize("tokenizer", [{"tokenizer": "bytes"}, {"train_tokenizer": 300}])
def test_the_splits_are_the_documents(
    tmp_path: Path, texts: list[str], request_of: Make, tokenizer: dict[str, object]
) -> None:
    manifest = prepare(tmp_path / "out", request_of(**tokenizer))
    train, val = documents_of(tmp_path / "out", "train"), documents_of(tmp_path / "out", "val")
    assert sorted(train + val) == sorted(texts) and len(val) == round(0.2 * 12)
    assert train == [text for text in texts if text in train]  # in the order of the files
    assert (manifest.train.documents, manifest.val.documents) == (10, 2)
    assert manifest.text_bytes == sum(len(text.encode()) for text in texts)


def test_the_seed_chooses_the_validation_documents(tmp_path: Path, request_of: Make) -> None:
    for seed in range(3):
        prepare(tmp_path / str(seed), request_of(seed=seed))
    assert len({str(documents_of(tmp_path / str(seed), "val")) for seed in range(3)}) > 1


def test_ids_are_those_of_whole_documents_though_pieces_are_tokenized(
    tmp_path: Path, request_of: Make, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of(train_tokenizer=290, val_fraction=0)
    whole = prepare(tmp_path / "whole", request)
    monkeypatch.setattr(packing, "PIECE_CHARACTERS", 200)
    pieces = prepare(tmp_path / "pieces", request)
    assert pieces.fingerprint == whole.fingerprint


def test_a_text_that_spells_the_end_token_does_not_end_its_document(tmp_path: Path) -> None:
    forged = "before <|endoftext|> after"
    (tmp_path / "a.txt").write_text(forged)
    (tmp_path / "b.txt").write_text("b")
    files = (str(tmp_path / "*.txt"),)
    prepare(tmp_path / "out", PrepareRequest(text=files, train_tokenizer=257, val_fraction=0))
    assert documents_of(tmp_path / "out", "train") == [forged, "b"]


def test_equal_documents_are_in_the_same_split(tmp_path: Path) -> None:
    lines = [f"line {index % 50}" for index in range(500)]
    (tmp_path / "lines.txt").write_text("\n".join(lines) + "\n")
    files = (str(tmp_path / "lines.txt"),)
    request = PrepareRequest(text=files, sample_by="line", tokenizer="bytes", val_fraction=0.3)
    prepare(tmp_path / "out", request)
    train, val = documents_of(tmp_path / "out", "train"), documents_of(tmp_path / "out", "val")
    assert len(train) + len(val) == 500 and val
    assert not set(train) & set(val)


class KilledError(Exception):
    """Stands for SIGKILL: what follows it in the process does not matter."""


@pytest.mark.parametrize("commit_seconds", [0, 1e9])
def test_an_interrupted_call_ends_with_the_same_bytes(
    tmp_path: Path, request_of: Make, monkeypatch: pytest.MonkeyPatch, commit_seconds: float
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_CHARACTERS", 300)
    monkeypatch.setattr(packing, "PIECE_CHARACTERS", 200)
    monkeypatch.setattr(packing, "COMMIT_SECONDS", commit_seconds)
    request = request_of(train_tokenizer=300, shard_tokens=500)
    prepare(tmp_path / "whole", request)
    tokenized = packing.tokenized

    def killed(*arguments: object) -> Iterator[object]:
        for number, result in enumerate(tokenized(*arguments)):  # type: ignore[arg-type]
            if number == 3:
                raise KilledError
            yield result

    monkeypatch.setattr(packing, "tokenized", killed)
    kills = 0
    while kills < 5:
        with pytest.raises(KilledError):
            prepare(tmp_path / "out", request)
        assert not (tmp_path / "out" / "manifest.json").exists()
        kills += 1
    monkeypatch.setattr(packing, "tokenized", tokenized)
    prepare(tmp_path / "out", request)
    assert same_files(tmp_path / "whole", tmp_path / "out")


def test_what_lies_beyond_the_journal_is_cut_off(
    tmp_path: Path, request_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a power failure: the file grew, the journal did not."""
    monkeypatch.setattr(chunks, "CHUNK_CHARACTERS", 300)
    monkeypatch.setattr(packing, "COMMIT_SECONDS", 0)
    request = request_of(shard_tokens=10**6)
    prepare(tmp_path / "whole", request)
    save = packing.Manifest.save
    monkeypatch.setattr(packing.Manifest, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(tmp_path / "out", request)
    with (tmp_path / "out" / "train-00000.npy").open("ab") as shard:
        shard.write(b"beyond")
    monkeypatch.setattr(packing.Manifest, "save", save)
    prepare(tmp_path / "out", request)
    assert same_files(tmp_path / "whole", tmp_path / "out")


def test_a_complete_folder_is_left_alone(folder: Path, request_of: Make) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    prepare(folder, request_of(shard_tokens=1000))
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_other_arguments_are_refused_with_the_difference(folder: Path, request_of: Make) -> None:
    with pytest.raises(ValueError, match=r"\(seed was 0, is 7; shard_tokens was 1000, is 500\)"):
        prepare(folder, request_of(seed=7, shard_tokens=500))


def test_a_changed_source_is_refused(tmp_path: Path, folder: Path, request_of: Make) -> None:
    (tmp_path / "texts" / "13.txt").write_text("one more")
    with pytest.raises(ValueError, match=r"other files \(\S+13\.txt is new\)"):
        prepare(folder, request_of(shard_tokens=1000))


def test_a_folder_with_other_files_is_refused(tmp_path: Path, request_of: Make) -> None:
    with pytest.raises(ValueError, match="holds other files, expected a new folder"):
        prepare(tmp_path, request_of())
    assert (tmp_path / "texts" / "00.txt").exists()


def test_only_one_call_writes_a_folder(tmp_path: Path, request_of: Make) -> None:
    from data.prepare import _locked

    (tmp_path / "out").mkdir()
    with _locked(tmp_path / "out"):
        with pytest.raises(ValueError, match="another `lowbit prepare` is writing"):
            prepare(tmp_path / "out", request_of())


def call(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(argument) for argument in arguments]))


def test_the_command_prepares_and_inspects(
    tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("--text", tmp_path / "texts" / "*.txt", "--train-tokenizer", "300", "--workers", "1")
    assert call(tmp_path / "out", *command) == 0
    assert "prepared, " in capsys.readouterr().out
    assert call(tmp_path / "out", *command) == 0
    assert "complete already" in capsys.readouterr().out
    assert call("--inspect", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "every hash is right" in shown and texts[0][:100] in shown


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", (), "0 documents with text"),
        (b"", ("--val-fraction", "0"), "gave 0 documents for training"),
        (b"alone", (), "1 documents with text cannot be split"),
        (b"caf\xe9", ("--val-fraction", "0"), "a.txt is not UTF-8 text"),
        (
            b"a\n",
            ("--sample-by", "line", "--val-fraction", "0.01"),
            "1 documents with text cannot be split",
        ),
        (b"a", ("--text-field", "body"), "--text-field does not apply to plain text"),
        (b"a", ("--config", "en"), "apply to --dataset only"),
        (b"a", ("--val-fraction", "1"), "val_fraction=1.0, expected"),
        (b"a", ("--shard-tokens", "0"), "shard_tokens=0, expected"),
        (b"a", ("--workers", "0"), "workers=0, expected"),
        (b"a", ("--train-tokenizer", "100"), "need at least 257"),
        (b"a", ("--tokenizer", "bytes", "--eos", "x"), "--eos 'x' has no effect"),
        (b"a", ("--tokenizer", "./none.json"), "no such file"),
        (b"a", ("--inspect", "x"), "not allowed with argument"),
    ],
)
def test_bad_input_is_one_line_and_no_manifest(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    options: tuple[str, ...],
    message: str,
) -> None:
    if not {"--tokenizer", "--train-tokenizer"} & set(options):
        options += ("--tokenizer", "bytes")
    if "--train-tokenizer" in options or "./none.json" in options:
        options += ("--val-fraction", "0")
    (tmp_path / "a.txt").write_bytes(content)
    try:
        call(tmp_path / "out", "--text", tmp_path / "a.txt", *options)
    except (ValueError, OSError) as error:
        assert message in str(error) and "\n" not in str(error)
    except SystemExit as stop:
        assert stop.code == 2 and message in capsys.readouterr().err
    else:
        pytest.fail(f"accepted {options}")
    assert not (tmp_path / "out").exists()
