"""`lowbit prepare`: text in, packed and verified token shards out."""

import argparse
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from data.chunks import PIECE_CHARACTERS, cut, split_key
from data.corpus import CORPORA
from data.durable import write_durably
from data.journal import Journal, refuse_difference
from data.packing import TOKENIZER_FILE, Packing, Splitter
from data.pretrained import load_vocabulary
from data.request import PrepareRequest
from data.shards import Manifest
from data.source import SampleBy, Source
from data.verify import check_complete, check_present, inspect, remember
from data.vocabulary import Vocabulary, trained_vocabulary

TRAINING_CHARACTERS = 2**27  # what a tokenizer sees of the training split: bounds time and memory
CORPUS_VOCABULARY = 4096


def prepare(
    out: str | Path, request: PrepareRequest, *, workers: int = 1, cache: str | Path | None = None
) -> Manifest:
    """Fill the folder `out`, or finish an interrupted call; a complete one is left as it is.

    The result does not depend on `workers` or on interruptions. Wheels of named corpora are kept in
    `cache`, by default `.cache` beside `out`. More than one worker means processes that import the
    calling program anew: call from under `if __name__ == "__main__"`.
    """
    if workers < 1:
        raise ValueError(f"workers={workers}, expected at least 1")
    folder, started = Path(out).expanduser(), time.time_ns()
    arguments, inputs = request.describe(), request.inputs()
    if (folder / "manifest.json").exists():
        manifest = Manifest.load(folder)
        listing = request.listing() if manifest.inputs is None else {}
        refuse_difference(folder, manifest.arguments, arguments | listing)
        if manifest.inputs is not None:
            check_complete(folder, manifest.inputs, inputs.all)
        check_present(folder, manifest)
        Journal.remove(folder)
        return manifest
    source = request.open_source(Path(cache) if cache else folder.parent / ".cache")
    split_of = _splitter(source, request)
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        journal = Journal.open(folder, arguments, inputs)
        try:
            vocabulary = _vocabulary(folder, request, journal, source, split_of)
            packing = Packing(source, split_of, vocabulary, request.shard_tokens)
            packing.run(folder, journal, workers)
        except (ValueError, OSError):
            Journal.abandon(folder)
            if new and not any(folder.iterdir()):
                folder.rmdir()
            raise
        remember(folder, journal.stamps, started)
        return Manifest.load(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it after SIGKILL
    except BlockingIOError as error:
        os.close(descriptor)
        raise ValueError(f"another `lowbit prepare` is writing {folder}") from error
    except OSError as error:
        os.close(descriptor)
        raise ValueError(f"{folder} cannot be locked ({error.strerror}): choose another") from error
    try:
        yield
    finally:
        os.close(descriptor)


def _splitter(source: Source, request: PrepareRequest) -> Splitter:
    """Which split a document belongs to, by its head."""
    fraction, seed = request.val_fraction, request.seed
    threshold = int(fraction * 2**64)
    if fraction:
        # The exact share, at least one, where their number is known; else whether there are two
        known = source.num_documents is not None
        heads = filter(None, (_head(document) for document in source.documents(None)))
        keys = sorted(split_key(seed, head) for head in islice(heads, None if known else 2))
        if len(keys) < 2:
            raise ValueError(
                f"{len(keys)} documents with text cannot be split into training and validation: "
                "expected more of them, --sample-by paragraph or --val-fraction 0"
            )
        if known:
            threshold = keys[min(max(1, round(fraction * len(keys))), len(keys) - 1)]
    return lambda head: "val" if split_key(seed, head) < threshold else "train"


def _head(document: Iterator[str]) -> str:
    return next(filter(None, document), "")


def _vocabulary(
    folder: Path, request: PrepareRequest, journal: Journal, source: Source, split_of: Splitter
) -> Vocabulary:
    path = folder / TOKENIZER_FILE
    if journal.eos_id is not None:  # what the ids already written came from
        return Vocabulary(path.read_text(encoding="utf-8"), journal.eos_id)
    if request.tokenizer:
        vocabulary = load_vocabulary(request.tokenizer, request.eos)
    else:
        assert request.train_tokenizer is not None
        texts = _training_texts(source, split_of)
        vocabulary = trained_vocabulary(texts, request.train_tokenizer)
    write_durably(path, vocabulary.json)
    journal.eos_id = vocabulary.eos_id
    return vocabulary


def _training_texts(source: Source, split_of: Splitter) -> Iterator[str]:
    room = TRAINING_CHARACTERS
    for document in source.documents(None):
        split = None
        for text, _ in cut(document, PIECE_CHARACTERS):
            split = split or split_of(text)
            if split == "train":
                yield text
                room -= len(text)
            if room <= 0:
                return


def _path(name: str) -> Path:
    return Path(name).expanduser()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lowbit prepare`; what is not given stays out of the namespace."""
    parser.argument_default = argparse.SUPPRESS
    add = parser.add_argument
    default = {field.name: field.default for field in fields(PrepareRequest)}
    add(
        "out",
        nargs="?",
        type=_path,
        default=None,
        help="folder to fill (corpus/NAME with --corpus)",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--corpus", choices=sorted(CORPORA), help="a named corpus")
    source.add_argument("--text", nargs="+", metavar="GLOB", help="text, JSONL or parquet files")
    source.add_argument("--dataset", metavar="NAME", help="hub dataset, or a folder of one")
    source.add_argument("--inspect", type=_path, metavar="DIR", help="verify and show a folder")
    add("--config", help="of --dataset")
    add("--split", help="of --dataset (train)")
    add("--streaming", action="store_true", help="read --dataset without storing it")
    add("--text-field", help="column that holds the text (text)")
    add("--sample-by", choices=get_args(SampleBy), help="a text file's documents (document: all)")
    tokenizer = parser.add_mutually_exclusive_group()
    names = "tokenizer.json, Llama-3 tokenizer.model, folder, hub id or bytes"
    tokenizer.add_argument("--tokenizer", metavar="NAME", help=names)
    training = f"a byte-level BPE of N entries ({CORPUS_VOCABULARY} with --corpus)"
    tokenizer.add_argument("--train-tokenizer", type=int, metavar="N", help=training)
    add("--eos", metavar="TOKEN", help="closes a document (the tokenizer's own)")
    add("--val-fraction", type=float, help=f"share held out ({default['val_fraction']})")
    add("--seed", type=int, help=f"of the validation split ({default['seed']})")
    add("--shard-tokens", type=int, help=f"size of a shard ({default['shard_tokens']})")
    add("--workers", type=int, help="processes (all cores)")
    add("--cache", type=_path, help="folder for downloaded wheels (.cache beside OUT)")


def run(args: argparse.Namespace) -> int:
    """Prepare or inspect; the summary goes to stdout."""
    given: dict[str, Any] = {
        key: value for key, value in vars(args).items() if key != "verb" and value is not None
    }
    if "inspect" in given:
        folder = given.pop("inspect")
        if given:
            raise ValueError(f"--inspect takes no other option: {sorted(given)}")
        print(inspect(folder))
        return 0
    workers, cache = given.pop("workers", os.cpu_count() or 1), given.pop("cache", None)
    out = given.pop("out", None)
    if "corpus" in given:
        out = out or Path("corpus") / given["corpus"]
        if "tokenizer" not in given:
            given.setdefault("train_tokenizer", CORPUS_VOCABULARY)
    if out is None:
        raise ValueError("expected the folder to fill: lowbit prepare OUT ...")
    complete = (out / "manifest.json").exists()
    manifest = prepare(out, PrepareRequest(**given), workers=workers, cache=cache)
    print(f"{out}: {'complete already' if complete else 'prepared'}, {manifest.summary()}")
    return 0
