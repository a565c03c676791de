"""Small prepared folders, and a cache of verified shards that is not the user's."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.prepare import prepare
from data.request import PrepareRequest
from data.shards import Manifest


@pytest.fixture(autouse=True)
def verified_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lowbit" / "verified"


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Twelve documents in twelve files, of words, lines and a few characters beyond ASCII."""
    generator = np.random.default_rng(0)
    words = ["low", "bit", "training", "of", "a", "small", "modèle", "is", "cheap;", "数", "\t42"]
    documents = []
    (tmp_path / "texts").mkdir()
    for index in range(12):
        lines = [" ".join(generator.choice(words, 9)) for _ in range(20 + 5 * index)]
        documents.append(f"Document {index}\n\n" + "\n".join(lines) + "\n")
        path = tmp_path / "texts" / f"{index:02d}.txt"
        path.write_text(documents[-1], encoding="utf-8", newline="")
    return documents


@pytest.fixture
def request_of(tmp_path: Path, texts: list[str]) -> Callable[..., PrepareRequest]:
    """A request for those documents as bytes, with other arguments where given."""

    def make(**arguments: object) -> PrepareRequest:
        defaults: dict[str, object] = {"text": (str(tmp_path / "texts" / "*.txt"),)}
        if "train_tokenizer" not in arguments:
            defaults["tokenizer"] = "bytes"
        return PrepareRequest(**defaults | {"val_fraction": 0.2} | arguments)  # type: ignore[arg-type]  # keys are fields

    return make


@pytest.fixture
def folder(tmp_path: Path, request_of: Callable[..., PrepareRequest]) -> Path:
    """The documents prepared as bytes, in shards of 1000 tokens."""
    prepare(tmp_path / "prepared", request_of(shard_tokens=1000))
    return tmp_path / "prepared"


@pytest.fixture
def manifest(folder: Path) -> Manifest:
    return Manifest.load(folder)
