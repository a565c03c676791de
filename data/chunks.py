"""Documents cut into pieces, pieces gathered into chunks: the unit of work and of restarting."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from data.shards import SplitName
from data.source import Source

PIECE_CHARACTERS = 2**14  # tokenizers are up to twice as fast on pieces as on whole books
CHUNK_CHARACTERS = 2**20
_HEAD_CHARACTERS = 4096


@dataclass(frozen=True)
class Position:
    """A place in a source: its state at a document border, and the pieces read since."""

    state: Any = None
    pieces: int = 0


@dataclass(frozen=True)
class Piece:
    """Part of a document, the unit of tokenization."""

    text: str
    split: SplitName
    last: bool


@dataclass
class Chunk:
    """Consecutive pieces and the position after them."""

    pieces: list[Piece] = field(default_factory=list)
    characters: int = 0
    empty_documents: int = 0
    end: Position = Position()

    def append(self, piece: Piece) -> None:
        """The next document."""
        self.pieces.append(piece)
        self.characters += len(piece.text)


def split_key(seed: int, head: str) -> int:
    """A document's draw for the validation split; equal ones draw alike, so none is in both."""
    message = f"{seed}:{head[:_HEAD_CHARACTERS]}".encode()
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "big")


def read_chunks(
    source: Source, position: Position, splitter: Callable[[str], SplitName], limit: int | None
) -> Iterator[Chunk]:
    """The pieces of `source` from `position` on; how they are grouped does not change them."""
    state, pieces, done = position.state, 0, position.pieces
    chunk = Chunk()
    for document in source.documents(state):
        split: SplitName | None = None
        for text, last in cut(document, limit):
            split = split or splitter(text)
            pieces += 1
            if pieces <= done:
                continue  # written before a restart
            chunk.append(Piece(text, split, last))
            # Only a long document is left in its middle: going on there means reading it again.
            if chunk.characters >= (CHUNK_CHARACTERS if last else 2 * CHUNK_CHARACTERS):
                if last:
                    state, pieces, done = source.state(), 0, 0
                chunk.end = Position(state, pieces)
                yield chunk
                chunk = Chunk()
        chunk.empty_documents += split is None and pieces >= done
    chunk.end = Position(source.state(), 0)
    yield chunk


def cut(blocks: Iterable[str], limit: int | None) -> Iterator[tuple[str, bool]]:
    """Pieces of at most `limit` characters, and whether each is the last; blocks do not matter."""
    rest = ""
    for block in blocks:
        for start in range(0, len(block), PIECE_CHARACTERS):
            rest += block[start : start + PIECE_CHARACTERS]
            while limit and len(rest) > limit:
                at = _border(rest, limit)
                yield rest[:at], False
                rest = rest[at:]
    if rest:
        yield rest, True


def _border(text: str, limit: int) -> int:
    """The last place to cut in the second half: after a line, else before a word, else mid-word."""
    start = limit // 2
    for pattern in (r"\n(?=\S)", r"(?<=\S)(?= \S)"):
        borders = [match.end() for match in re.finditer(pattern, text[start : limit + 1])]
        if borders:
            return start + borders[-1]
    return limit
