"""From a source to a complete folder, from wherever an earlier call was interrupted."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data.chunks import PIECE_CHARACTERS, Chunk, read_chunks
from data.journal import Journal
from data.shards import SPLITS, Manifest, SplitName
from data.source import Source
from data.verify import refuse_changes
from data.vocabulary import Vocabulary
from data.workers import Tokens, tokenized
from data.writer import SplitWriter

COMMIT_SECONDS = 1.0
MAX_LOST = 0.01  # of the text's bytes; less is said, not refused
TOKENIZER_FILE = "tokenizer.json"
Splitter = Callable[[str], SplitName]


@dataclass(frozen=True)
class Packing:
    """What turns documents into shards."""

    source: Source
    split_of: Splitter
    vocabulary: Vocabulary
    shard_tokens: int

    def run(self, folder: Path, journal: Journal, workers: int) -> None:
        """Fill `folder` from where `journal` stands; the manifest is the last thing written."""
        writers = {
            name: SplitWriter(folder, name, self.vocabulary.dtype, self.shard_tokens, progress)
            for name, progress in journal.splits.items()
        }
        limit = PIECE_CHARACTERS if self.vocabulary.cuts_cleanly else None
        chunks = read_chunks(self.source, journal.position, self.split_of, limit)
        start, committed = time.monotonic(), time.monotonic()
        tokens_before = sum(writer.progress.tokens for writer in writers.values())
        with _bar(self.source.num_bytes, journal.text_bytes) as bar:
            for chunk, tokens in tokenized(chunks, self.vocabulary, workers):
                _record(chunk, tokens, writers, journal)
                journal.sha256 |= self.source.sha256
                bar.update(journal.text_bytes - bar.n)
                done = sum(writer.progress.tokens for writer in writers.values()) - tokens_before
                bar.set_postfix_str(f"{done / (time.monotonic() - start):,.0f} tokens/s")
                if time.monotonic() - committed > COMMIT_SECONDS:
                    for writer in writers.values():
                        writer.sync()
                    journal.save(folder)
                    committed = time.monotonic()
        manifest = self._manifest(writers, journal)
        names = map(Path, journal.stamps)
        refuse_changes(folder, manifest.inputs or {}, journal.stamps, names)  # since it was read
        manifest.save(folder)
        Journal.remove(folder)

    def _manifest(self, writers: dict[SplitName, SplitWriter], journal: Journal) -> Manifest:
        train, val = (writers[name].finish() for name in SPLITS)
        fraction = journal.arguments["val_fraction"]
        if not train.tokens or (fraction and not val.tokens):
            raise ValueError(
                f"the source gave {train.documents} documents for training and {val.documents} for "
                f"validation: expected some of each with --val-fraction {fraction}"
            )
        return Manifest(
            dtype=self.vocabulary.dtype,
            vocab_size=self.vocabulary.size,
            eos_id=self.vocabulary.eos_id,
            tokenizer_file=TOKENIZER_FILE,
            tokenizer_sha256=self.vocabulary.sha256,
            train=train,
            val=val,
            text_bytes=journal.text_bytes,
            empty_documents=journal.empty_documents,
            arguments=journal.arguments,
            inputs=dict(sorted(journal.sha256.items())),
            lost_characters=dict(sorted(journal.lost.items())),
        )


def _record(
    chunk: Chunk, tokens: Tokens, writers: dict[SplitName, SplitWriter], journal: Journal
) -> None:
    for char, count in tokens.lost.items():
        journal.lost[char] = journal.lost.get(char, 0) + count
    journal.text_bytes += sum(len(piece.text.encode()) for piece in chunk.pieces)
    _refuse_losses(journal)
    for name, writer in writers.items():
        documents = sum(piece.last for piece in chunk.pieces if piece.split == name)
        writer.append(tokens.ids[name], documents)
    journal.empty_documents += chunk.empty_documents
    journal.position = chunk.end


def _refuse_losses(journal: Journal) -> None:
    lost = sum(len(char.encode()) * count for char, count in journal.lost.items())
    if lost > MAX_LOST * journal.text_bytes:
        examples = "".join(sorted(journal.lost)[:8])
        raise ValueError(
            f"the tokenizer does not give back {lost:,} of the first {journal.text_bytes:,} bytes "
            f"(as {examples!r}): at most {MAX_LOST:.0%} may be lost; expected one that covers "
            "every byte"
        )


def _bar(total: int | None, done: int) -> "tqdm[None]":
    return tqdm(total=total, initial=done, unit="B", unit_scale=True, disable=None)
