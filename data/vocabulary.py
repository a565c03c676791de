"""A vocabulary: the text of a tokenizer.json and a known end of document; trained, or bytes."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

EOS = "<|endoftext|>"


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as the text of its tokenizer.json, and the id that closes a document."""

    json: str
    eos_id: int

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """That of the tokenizers library."""
        tokenizer = Tokenizer.from_str(self.json)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # Text that spells a special token stays text: no document can forge its own end.
        tokenizer.encode_special_tokens = True
        return tokenizer

    @cached_property
    def size(self) -> int:
        """Number of ids."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def sha256(self) -> str:
        """Of the tokenizer's file."""
        return hashlib.sha256(self.json.encode()).hexdigest()

    @property
    def dtype(self) -> str:
        """The smallest that holds every id."""
        return "uint16" if self.size <= 2**16 else "uint32"

    @cached_property
    def cuts_cleanly(self) -> bool:
        """Whether the parts of a text, cut between words, have the ids of the whole."""
        left, right = "One two", " three.\n"
        whole = self.encode(left + right + left)
        parts = [self.encode(left), self.encode(right), self.encode(left)]
        return np.array_equal(whole, np.concatenate(parts))

    def encode(self, text: str) -> NDArray[Any]:
        """The ids of `text`, without special tokens."""
        [ids] = self.encoded([text])
        return ids

    def encoded(self, texts: Iterable[str]) -> Iterator[NDArray[Any]]:
        """The ids of each text, by as many at a time as the processor's caches hold."""
        texts, dtype = iter(texts), np.dtype(self.dtype)
        while batch := list(islice(texts, 32)):
            for encoding in self.tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                yield np.array(encoding.ids, dtype=dtype)

    def lost(self, text: str) -> dict[str, int]:
        """The characters of `text` that its ids do not give back, and how often each occurs."""
        return {char: text.count(char) for char in set(text) if not self._gives_back(char)}

    @cached_property
    def _known(self) -> dict[str, bool]:
        return {}

    def _gives_back(self, char: str) -> bool:
        """Of white space pre-tokenizers keep what they keep: no loss of a letter."""
        if (known := self._known.get(char)) is None:
            words = (char, f"a{char}")  # some are known within a word only
            known = char.isspace() or any(char in self.decode(self.encode(w)) for w in words)
            self._known[char] = known
        return known

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)


def byte_vocabulary() -> Vocabulary:
    """Token id = byte value, 256 = end of document."""
    characters = {character: byte for byte, character in enumerate(byte_characters())}
    return _with_eos(_byte_level(models.BPE(vocab=characters, merges=[]), use_regex=False))


def trained_vocabulary(texts: Iterable[str], size: int) -> Vocabulary:
    """A byte-level BPE of `size` entries, the end of document among them; deterministic."""
    if size < 257:
        raise ValueError(f"--train-tokenizer {size}: 256 bytes and {EOS} need at least 257 entries")
    tokenizer = _byte_level(models.BPE(), use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = _with_eos(tokenizer)
    if vocabulary.size < size:
        raise ValueError(f"--train-tokenizer {size}: the text gives only {vocabulary.size} entries")
    return vocabulary


def _byte_level(model: models.Model, *, use_regex: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _with_eos(tokenizer: Tokenizer) -> Vocabulary:
    tokenizer.add_special_tokens([EOS])
    eos_id = tokenizer.token_to_id(EOS)
    assert eos_id is not None
    return Vocabulary(tokenizer.to_str(pretty=True), eos_id)


def byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself where it prints, else the next above 255."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    stand_in = iter(range(256, 512))
    return [chr(byte if byte in printable else next(stand_in)) for byte in range(256)]
