"""When and where the kernels are built; what happens where they cannot be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowbit import kernels
from lowbit.kernels.cpu import build

# 0.3 in steps of 2^-8 is 77 / 256
QUANTIZE = "import torch, lowbit; print(lowbit.fake_quantize(torch.full((4,), 0.3), 'mxint8')[0])"


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
