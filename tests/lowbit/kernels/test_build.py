"""When and where the kernels are built; what happens where they cannot be."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from lowbit import kernels
from lowbit.kernels.cpu import build

# 0.3 in steps of 2^-8 is 77 / 256
QUANTIZE = "import torch, lowbit; print(lowbit.fake_quantize(torch.full((4,), 0.3), 'mxint8')[0])"

X86 = platform.machine() in ("x86_64", "AMD64")


def _python(code: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="'maybe'"), kernels.using("maybe"):
        pass


@pytest.mark.parametrize("variable", ["LOWBIT_CACHE", "XDG_CACHE_HOME"])
def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str) -> None:
    monkeypatch.delenv("LOWBIT_CACHE", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    assert tmp_path in (build.cache_dir(), build.cache_dir().parent)


@pytest.mark.slow
def test_two_processes_at_once_build_once(tmp_path: Path) -> None:
    processes = [
        _python(QUANTIZE, LOWBIT_CACHE=str(tmp_path), LOWBIT_KERNELS="require") for _ in range(2)
    ]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert {output for output, _ in outputs} == {"tensor(0.3008)\n"}
    (library,) = tmp_path.glob("*.so")
    built = library.stat().st_ino
    _python(QUANTIZE, LOWBIT_CACHE=str(tmp_path)).communicate()
    assert library.stat().st_ino == built  # found, not built again


DAMAGES = {
    "half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "a flipped bit": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "longer": lambda data: data + b"\0",
}


def _tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Sources that are built in no time, and the cache folder."""
    sources, cache = tmp_path / "sources", tmp_path / "cache"
    sources.mkdir()
    (sources / "tiny.cpp").write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setattr(build, "_SOURCES", sources)
    monkeypatch.setenv("LOWBIT_CACHE", str(cache))
    return cache


@pytest.mark.parametrize("suffix", [".so", ".so.sha256"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_built_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: str, suffix: str
) -> None:
    cache = _tiny(monkeypatch, tmp_path)
    build.load()
    (library,) = cache.glob("*.so")
    subprocess.run(["sha256sum", "-c", f"{library.name}.sha256"], cwd=cache, check=True)
    whole, path = library.read_bytes(), library.with_suffix(suffix)
    # as a new file: the loaded one is mapped
    path.with_suffix(".new").write_bytes(DAMAGES[damage](path.read_bytes()))
    path.with_suffix(".new").replace(path)
    assert build.load().answer() == 42
    assert library.read_bytes() == whole
    assert sorted(p.suffix for p in cache.iterdir()) == [".lock", ".sha256", ".so"]


def test_a_library_without_its_checksum_is_built_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache = _tiny(monkeypatch, tmp_path)
    build.load()
    (checksum,) = cache.glob("*.sha256")
    checksum.unlink()
    assert build.load().answer() == 42 and checksum.exists()


@pytest.mark.parametrize("name", ["x86-64-v9", "armv8-a" if X86 else "x86-64", "native "])
def test_a_level_that_the_machine_does_not_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("LOWBIT_MARCH", name)
    with pytest.raises(ValueError, match=f"LOWBIT_MARCH='{name}', this machine runs native") as e:
        build.load()
    assert len(str(e.value)) <= 200


def test_each_level_has_a_library_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache = _tiny(monkeypatch, tmp_path)
    here = [name for name, level in build.LEVELS.items() if level.runs_here]
    for name in here:
        monkeypatch.setenv("LOWBIT_MARCH", name)
        assert build.load().answer() == 42
    assert len(list(cache.glob("*.so"))) == len(here) > 1


@pytest.mark.slow
def test_without_a_compiler(tmp_path: Path) -> None:
    nothing = {"LOWBIT_CACHE": str(tmp_path), "CXX": "no-such-compiler"}
    process = _python(QUANTIZE + ";" + QUANTIZE, **nothing, LOWBIT_KERNELS="auto")
    output, errors = process.communicate()
    assert output == "tensor(0.3008)\n" * 2
    assert errors.count("kernels off") == 1 and "no-such-compiler" in errors
    process = _python(QUANTIZE, **nothing, LOWBIT_KERNELS="require")
    assert "BuildError: no C++ compiler" in process.communicate()[1]
    process = _python(QUANTIZE, **nothing, LOWBIT_KERNELS="off")
    assert process.communicate() == ("tensor(0.3008)\n", "")
