"""Tokenizers: bytes, trained, loaded; what is decoded is what was encoded."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from data.chunks import PIECE_CHARACTERS, cut
from data.pretrained import llama3_tokenizer, load_vocabulary
from data.vocabulary import EOS, Vocabulary, byte_vocabulary, trained_vocabulary

BYTES = byte_vocabulary()
TRAINED = trained_vocabulary(["low-bit training of low-bit models\n" * 50], 270)


@given(st.text())
def test_a_byte_is_its_own_id(text: str) -> None:
    assert BYTES.encode(text).tolist() == list(text.encode())


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    assert TRAINED.decode(TRAINED.encode(text).tolist()) == text


def test_sizes_and_types() -> None:
    assert (BYTES.size, BYTES.eos_id, BYTES.dtype) == (257, 256, "uint16")
    assert (TRAINED.size, TRAINED.eos_id, TRAINED.dtype) == (270, 0, "uint16")


def test_training_is_deterministic() -> None:
    texts = [f"text {index} about {index % 7} models\n" * 20 for index in range(200)]
    assert trained_vocabulary(texts, 280) == trained_vocabulary(iter(texts), 280)


def test_a_vocabulary_that_the_text_cannot_fill_is_refused() -> None:
    with pytest.raises(ValueError, match="--train-tokenizer 999: the text gives only 277 entries"):
        trained_vocabulary(["low-bit training of low-bit models\n" * 50], 999)


@pytest.mark.parametrize("vocabulary", [BYTES, TRAINED])
def test_a_special_token_in_the_text_stays_text(vocabulary: Vocabulary) -> None:
    assert vocabulary.eos_id not in vocabulary.encode(f"a {EOS} b").tolist()


@given(st.text(alphabet="ab \n\té", max_size=400), st.integers(2, 50))
def test_pieces_are_the_text_whatever_the_blocks(text: str, limit: int) -> None:
    pieces = list(cut([text], limit))
    assert "".join(piece for piece, _ in pieces) == text
    assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True] * bool(text)
    assert all(0 < len(piece) <= limit for piece, _ in pieces)
    assert list(cut(list(text), limit)) == pieces


def test_pieces_of_a_long_text_have_its_ids() -> None:
    words = np.random.default_rng(0).choice(["low", "bit\n", " training", "é", "\n\n"], 20_000)
    text = " ".join(words)
    parts = [TRAINED.encode(piece) for piece, _ in cut([text], PIECE_CHARACTERS)]
    assert len(parts) > 3
    assert np.concatenate(parts).tolist() == TRAINED.encode(text).tolist()


def test_a_tokenizer_that_prefixes_a_space_is_not_given_pieces() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"▁": 0, "a": 1, "</s>": 2}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    assert BYTES.cuts_cleanly and TRAINED.cuts_cleanly
    assert not Vocabulary(tokenizer.to_str(), 2).cuts_cleanly


def save(path: Path, tokens: list[str]) -> str:
    vocab = {token: index for index, token in enumerate(tokens)}
    Tokenizer(models.WordLevel(vocab, unk_token=tokens[0])).save(str(path))
    return str(path)


def test_the_end_of_a_document_is_found_or_named(tmp_path: Path) -> None:
    known = save(tmp_path / "known.json", ["a", "</s>"])
    assert load_vocabulary(known).eos_id == 1
    unknown = save(tmp_path / "unknown.json", ["a", "b", "[END]"])
    assert load_vocabulary(unknown, eos="[END]").eos_id == 2
    with pytest.raises(ValueError, match=r"has none of .*<\|endoftext\|>.*name its end with --eos"):
        load_vocabulary(unknown)
    with pytest.raises(ValueError, match=r"none of \['<end>'\]"):
        load_vocabulary(known, eos="<end>")


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(BYTES.json)
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "t.json"))
    assert load_vocabulary(str(tmp_path / "t.json")).encode("abc").tolist() == [97, 98, 99]


def test_a_folder_of_transformers_is_loaded_with_its_end(tmp_path: Path) -> None:
    save(tmp_path / "tokenizer.json", ["a", "[STOP]"])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "[STOP]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_vocabulary(str(tmp_path)).eos_id == 1


def test_a_llama3_file_merges_as_its_ranks_say(tmp_path: Path) -> None:
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b"ab", b"bc", b"abc", b" a", b" abc", b"xyz"]  # xyz: no two parts are tokens
    lines = [b"%s %d" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    vocabulary = load_vocabulary(str(tmp_path / "tokenizer.model"))
    assert vocabulary.size == 262 + 256 and vocabulary.eos_id == 262 + 1

    def ids(text: str) -> list[int]:
        return vocabulary.encode(text).tolist()

    # The earlier rank first: ab + c, so bc is never formed of abc; whole words are taken whole.
    assert ids("abc") == [258]
    assert ids("abcabc") == [258, 258]
    assert ids("abbc abc") == [256, 257, 260]
    assert ids("xyz") == [261]
    assert ids("xyzx") == [120, 121, 122, 120]


@pytest.mark.parametrize("content", [b"not base64!! 3\n", b"\xff\xfe", b"YQ==\n"])
def test_another_model_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"is not a Llama-3 tokenizer\.model"):
        llama3_tokenizer(tmp_path / "tokenizer.model")


def test_a_broken_tokenizer_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
        load_vocabulary(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("name", ["none.json", "./none", "/none/at/all", "none.model"])
def test_a_missing_tokenizer_is_named(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"--tokenizer {name}: no such file"):
        load_vocabulary(name)
