"""Tokenization by worker processes: in order, in bounded memory, gone when the parent is."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.chunks import Chunk, Piece
from data.shards import SPLITS, SplitName
from data.vocabulary import Vocabulary

Tokens = dict[SplitName, NDArray[Any]]
_QUEUE_PER_WORKER = 2  # chunks in flight; with their size, this bounds the memory


def tokenize_pieces(vocabulary: Vocabulary, pieces: list[Piece]) -> Tokens:
    """The ids of the pieces by split, EOS after each document."""
    eos = np.array([vocabulary.eos_id], dtype=vocabulary.dtype)
    parts: dict[SplitName, list[NDArray[Any]]] = {name: [eos[:0]] for name in SPLITS}
    for piece, ids in zip(pieces, vocabulary.encoded(piece.text for piece in pieces), strict=True):
        parts[piece.split] += [ids] + [eos] * piece.last
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


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
        for chunk in chunks:
            queue.append((chunk, pool.submit(_work, chunk.pieces)))
            if len(queue) >= _QUEUE_PER_WORKER * workers:
                oldest, future = queue.popleft()
                yield oldest, future.result()
        for chunk, future in queue:
            yield chunk, future.result()


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
