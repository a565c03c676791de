"""Tokenization by worker processes: in order, in bounded memory, gone when the parent is."""

import multiprocessing
import os
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.chunks import Chunk, Piece
from data.shards import SPLITS, SplitName
from data.vocabulary import Vocabulary

_QUEUE_PER_WORKER = 2  # chunks in flight; with their size, this bounds the memory


@dataclass(frozen=True)
class Tokens:
    """The ids of pieces by split, and how often which of their characters no id gives back."""

    ids: dict[SplitName, NDArray[Any]]
    lost: dict[str, int]


def tokenize_pieces(vocabulary: Vocabulary, pieces: list[Piece]) -> Tokens:
    """The ids of the pieces by split, EOS after each document."""
    eos = np.array([vocabulary.eos_id], dtype=vocabulary.dtype)
    lost: Counter[str] = Counter()
    parts: dict[SplitName, list[NDArray[Any]]] = {name: [eos[:0]] for name in SPLITS}
    for piece, ids in zip(pieces, vocabulary.encoded(piece.text for piece in pieces), strict=True):
        if (inner := np.flatnonzero(ids == vocabulary.eos_id)).size:
            where = vocabulary.decode(ids[max(inner[0] - 4, 0) : inner[0] + 5].tolist())
            raise ValueError(
                f"text holds the end of a document, {vocabulary.decode([vocabulary.eos_id])!r}, "
                f"{inner.size} times within one (as in {where!r}): name another end with --eos"
            )
        parts[piece.split] += [ids] + [eos] * piece.last
        lost.update(vocabulary.lost(piece.text))
    return Tokens({name: np.concatenate(arrays) for name, arrays in parts.items()}, dict(lost))


def tokenized(
    chunks: Iterable[Chunk], vocabulary: Vocabulary, workers: int
) -> Iterator[tuple[Chunk, Tokens]]:
    """Each chunk with its ids, in order, computed by `workers` processes (one: in this one)."""
    if workers == 1:
        yield from ((chunk, tokenize_pieces(vocabulary, chunk.pieces)) for chunk in chunks)
        return
    queue: deque[tuple[Chunk, Future[Tokens]]] = deque()
    context = multiprocessing.get_context("spawn")  # fork would copy the locks of reader threads
    with ProcessPoolExecutor(workers, context, _start_worker, (replace(vocabulary),)) as pool:
        try:
            for chunk in chunks:
                queue.append((chunk, pool.submit(_work, chunk.pieces)))
                if len(queue) >= _QUEUE_PER_WORKER * workers:
                    oldest, future = queue.popleft()
                    yield oldest, future.result()
            for chunk, future in queue:
                yield chunk, future.result()
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a worker process was ended from outside (out of memory?): the same call goes on, "
                f"with fewer than --workers {workers} in less memory"
            ) from error


_worker_vocabulary: Vocabulary  # of a worker process, sent once


def _start_worker(vocabulary: Vocabulary) -> None:
    global _worker_vocabulary
    _worker_vocabulary = vocabulary
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A killed parent leaves its workers waiting: each holds the queue's other end open."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(pieces: list[Piece]) -> Tokens:
    return tokenize_pieces(_worker_vocabulary, pieces)
