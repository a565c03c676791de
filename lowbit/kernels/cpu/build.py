"""Compile the C++ kernels with the machine's compiler on first use, and load them.

The library lies in a cache folder ($LOWBIT_CACHE, else $XDG_CACHE_HOME/lowbit, else
~/.cache/lowbit) under a hash of sources, compiler, flags and processor, so that machines that share
a home folder do not share code. Of several processes that need it at once, one builds.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

_SOURCES = Path(__file__).parent
# bit equality forbids contraction to FMA; nobody reads errno or the floating-point flags
_FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)


class BuildError(RuntimeError):
    """The kernels cannot be built here; the message says why."""


def cache_dir() -> Path:
    """Where built libraries lie."""
    if path := os.environ.get("LOWBIT_CACHE"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowbit"


def load() -> ctypes.CDLL:
    """The kernels' library, built if it is not in the cache; BuildError without a compiler."""
    compiler = os.environ.get("CXX") or "c++"
    path = shutil.which(compiler)
    if path is None:
        raise BuildError(f"no C++ compiler {compiler!r} (set CXX)")
    flags = (*_FLAGS, *_wide_vectors())
    library = cache_dir() / f"kernels-{_fingerprint(path, flags)}.so"
    try:
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            with open(library.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not library.exists():  # another process may have built it meanwhile
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
        os.replace(built, library)


def _wide_vectors() -> tuple[str, ...]:
    """GCC and clang keep to half of AVX-512's width unless told."""
    return ("-mprefer-vector-width=512",) if "avx512f" in _processor().split() else ()


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
    for source in sorted((*_SOURCES.glob("*.cpp"), *_SOURCES.glob("*.h"))):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:24]
