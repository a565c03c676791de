"""Files of text: which are meant, and their content, hashed on the way."""

import bz2
import codecs
import glob
import gzip
import hashlib
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

BLOCK_BYTES = 2**16
MAX_LINE = 2**26  # characters: what a row or a line may hold, which is in memory at once
COMPRESSIONS = {".gz", ".zst", ".bz2", ".xz"}
Report = Callable[[Path, str], None]  # told a file's SHA-256 when all of it was read


def find_files(patterns: Iterable[str]) -> list[Path]:
    """The files of paths and globs in the order of their names; each once, by whatever name."""
    paths = {path for pattern in patterns for path in _matches(pattern)}
    by_file: dict[str, Path] = {}
    # Of several names the shortest: a loop of symbolic links has no end of them.
    for path in sorted(paths, key=lambda path: (path.is_symlink(), len(path.parts), path)):
        by_file.setdefault(os.path.realpath(path), path)
    return sorted(by_file.values())


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        raise ValueError(f"--text {pattern} is a folder: name its files, as in '{path}/**/*.txt'")
    if path.exists():
        return [path]  # taken as it is, whatever its name means to glob
    found = [Path(name) for name in glob.glob(str(path), recursive=True)]
    found = [path for path in found if path.is_file()]
    if not found:
        raise FileNotFoundError(f"--text {pattern}: no such file")
    return found


def extension(path: Path) -> str:
    """The last suffix that names no compression, in small letters."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSIONS]
    return suffixes[-1].lower() if suffixes else ""


def digest(path: Path) -> str:
    """SHA-256 of the file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Hashed(io.RawIOBase):
    """A file's bytes, hashed as they are read."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self.sha256 = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer) or 0
        self.sha256.update(memoryview(buffer)[:count])
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _blocks(path: Path, report: Report) -> Iterator[bytes]:
    """The file's bytes, decompressed where its name says so."""
    with _Hashed(path) as raw:
        try:
            stream = _decompressed(raw, path.suffix)
            while block := stream.read(BLOCK_BYTES):
                yield block
        except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{path} cannot be read: {reason}") from error
        while raw.read(BLOCK_BYTES):
            pass  # what stands after the end of a compressed stream
        sha256 = raw.sha256.hexdigest()
    report(path, sha256)


def _decompressed(raw: _Hashed, suffix: str) -> Any:
    file = io.BufferedReader(raw, 2**20)
    match suffix:
        case ".gz":
            return gzip.GzipFile(fileobj=file)
        case ".bz2":
            return bz2.BZ2File(file)
        case ".xz":
            return lzma.LZMAFile(file)
        case ".zst":
            import pyarrow  # which `datasets` brings

            return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")
    return file


def read_text(path: Path, report: Report) -> Iterator[str]:
    """The file's text in blocks, line ends as they are; a mark of the byte order is no text."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        for block in _blocks(path, report):
            yield decoder.decode(block)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason}") from error


def read_lines(path: Path, report: Report) -> Iterator[str]:
    """The file's lines, each with its end."""
    parts: list[str] = []
    for block in read_text(path, report):
        *whole, rest = block.split("\n")
        for line in whole:
            yield "".join([*parts, line, "\n"])
            parts = []
        parts.append(rest)
        if len(parts) * BLOCK_BYTES > MAX_LINE and sum(map(len, parts)) > MAX_LINE:
            raise ValueError(f"{path} holds a line of more than {MAX_LINE:,} characters")
    if rest := "".join(parts):
        yield rest
