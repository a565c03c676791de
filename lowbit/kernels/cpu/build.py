"""Compile the C++ kernels with the machine's compiler on first use, and load them.

The library lies in a cache folder ($LOWBIT_CACHE, else $XDG_CACHE_HOME/lowbit, else
~/.cache/lowbit) under a hash of sources, compiler, flags and processor, so that machines that share
a home folder do not share code. Of several processes that need it at once, one builds. Beside it
lies its SHA-256: a library that does not have it is built anew, never loaded.

The environment variable LOWBIT_MARCH chooses the instructions, one of `LEVELS` that the processor
has; `native` (default) takes all of them. Results have the same bits under each.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_SOURCES = Path(__file__).parent
# bit equality forbids contraction to FMA; nobody reads errno or the floating-point flags
_FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)


class BuildError(RuntimeError):
    """The kernels cannot be built here; the message says why."""


@dataclass(frozen=True)
class Level:
    """A set of instructions: the compiler's flags for it, and what Linux calls it."""

    flags: tuple[str, ...]
    needs: str = ""

    @property
    def runs_here(self) -> bool:
        """Whether this processor has what the library was built for."""
        return set(self.needs.split()) <= set(_processor().split())


_V3 = "avx avx2 bmi1 bmi2 f16c fma abm movbe"
_V4 = "avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni"
# Asks for a line that will be written as its only owner, which AVX2 and AVX-512 do not imply: where
# a processor does not know the instruction, it does nothing.
_OWN = "-mprfchw"
LEVELS = {
    "native": Level(("-march=native",)),
    "x86-64": Level(("-march=x86-64",), "sse2"),
    "x86-64-v3": Level(("-march=x86-64-v3", _OWN), _V3),
    "x86-64-v3+avxvnni": Level(("-march=x86-64-v3", _OWN, "-mavxvnni"), f"{_V3} avx_vnni"),
    "x86-64-v4+avx512vnni": Level(("-march=x86-64-v4", _OWN, "-mavx512vnni"), f"{_V3} {_V4}"),
    "armv8-a": Level(("-march=armv8-a",), "asimd"),
}


def level() -> str:
    """The name of the chosen instructions; ValueError for others than the processor's."""
    name = os.environ.get("LOWBIT_MARCH") or "native"
    here = [name for name, level in LEVELS.items() if level.runs_here]
    if name not in here:
        raise ValueError(f"LOWBIT_MARCH={name!r}, this machine runs {', '.join(here)}")
    return name


def cache_dir() -> Path:
    """Where built libraries lie."""
    if path := os.environ.get("LOWBIT_CACHE"):
        return Path(path)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowbit"
    except RuntimeError:  # a user without a home, as in containers
        raise BuildError("no home to keep built kernels in: set LOWBIT_CACHE") from None


def load() -> ctypes.CDLL:
    """The kernels' library, built if it is not in the cache; BuildError without a compiler."""
    compiler = os.environ.get("CXX") or "c++"
    path = shutil.which(compiler)
    if path is None:
        raise BuildError(f"no C++ compiler {compiler!r} (set CXX)")
    flags = (*_FLAGS, *LEVELS[level()].flags, *_wide_vectors())
    library = cache_dir() / f"kernels-{_fingerprint(path, flags)}.so"
    try:
        if not _is_whole(library):
            library.parent.mkdir(parents=True, exist_ok=True)
            with open(library.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not _is_whole(library):  # another process may have built it meanwhile
                    _compile(path, flags, library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildError(f"cannot build or load {library}: {error}") from error


def _compile(compiler: str, flags: tuple[str, ...], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        sources = sorted(str(path) for path in _SOURCES.glob("*.cpp"))
        command = [compiler, *flags, *sources, "-o", str(built)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise BuildError(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
        checksum = _checksum_of(built)
        checksum.write_text(_line(built))
        for path in (built, checksum):  # the second tells that the first is there
            _move_durably(path, library.parent)


def _checksum_of(library: Path) -> Path:
    return library.with_suffix(".so.sha256")


def _line(library: Path) -> str:
    """As `sha256sum` prints and checks it."""
    return f"{hashlib.sha256(library.read_bytes()).hexdigest()}  {library.name}\n"


def _is_whole(library: Path) -> bool:
    """A damaged one would kill the process, or compute something else."""
    try:
        return _checksum_of(library).read_text(errors="replace") == _line(library)
    except FileNotFoundError:
        return False


def _move_durably(path: Path, folder: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    os.replace(path, folder / path.name)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _wide_vectors() -> tuple[str, ...]:
    """GCC and clang keep to half of AVX-512's width unless told."""
    wide = "avx512f" in (_processor() if level() == "native" else LEVELS[level()].needs).split()
    return ("-mprefer-vector-width=512",) if wide else ()


@lru_cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        wanted = ("model name", "flags", "Features", "CPU part")
        return "\n".join(line for line in lines if line.startswith(wanted))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"


def _fingerprint(compiler: str, flags: tuple[str, ...]) -> str:
    real = Path(compiler).resolve()
    status = real.stat()  # quicker than asking the compiler for its version
    digest = hashlib.sha256()
    for part in (real, status.st_size, status.st_mtime_ns, *flags, _processor()):
        digest.update(f"{part}\n".encode())
    for source in sorted((*_SOURCES.glob("*.cpp"), *_SOURCES.rglob("*.h"))):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:24]
