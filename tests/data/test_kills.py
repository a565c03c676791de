"""`lowbit prepare` under SIGKILL, and with any number of workers: the same bytes."""

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SEED = 20260101
KILLS = 10
# `lowbit`, whose journal is written every 50 ms: a fast machine is done within its usual second
PROGRAM = """
import sys
import data.packing
data.packing.COMMIT_SECONDS = 0.05
from train.cli import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 10 MB of lines, one of 3 MB among them."""
    generator = random.Random(SEED)
    words = ["".join(generator.choices("abcdefghijklmnop", k=length)) for length in range(2, 60)]
    lengths = [20] * 6_000 + [100_000] + [20] * 6_000
    lines = [" ".join(generator.choices(words, k=length)) for length in lengths]
    path = tmp_path_factory.mktemp("source") / "lines.txt"
    path.write_text("\n".join(lines))
    return path


def start(source: Path, out: Path, workers: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", PROGRAM, "prepare", out, "--text", source]
    command += ["--sample-by", "line", "--train-tokenizer", "500", "--val-fraction", "0.1"]
    command += ["--shard-tokens", "200000", "--workers", str(workers)]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def finish(source: Path, out: Path, workers: int) -> dict[str, bytes]:
    _, errors = start(source, out, workers).communicate(timeout=120)
    assert (out / "manifest.json").exists(), errors
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.fixture(scope="module")
def uninterrupted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return finish(source, tmp_path_factory.mktemp("reference") / "out", workers=1)


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_do_not_change_a_byte(
    source: Path, uninterrupted: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    assert finish(source, tmp_path / "out", workers) == uninterrupted


def test_ten_kills_do_not_change_a_byte(
    source: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    generator = random.Random(SEED)
    out, kills, resumed = tmp_path / "out", 0, 0
    while kills < KILLS:
        before = changed(out)
        process = start(source, out, workers=2)
        if kills % 4 == 0:  # at any moment of the start, or of the tokenizer's training
            time.sleep(generator.uniform(0, 3))
        else:  # at any moment of the writing
            wait_for(lambda b=before, p=process: changed(out) > b or p.poll() is not None)
            time.sleep(generator.uniform(0, 1))
        process.kill()
        process.communicate()
        wait_for(lambda group=process.pid: not alive(group))  # its workers end by themselves
        if (out / "manifest.json").exists():  # before the kill: begin anew
            assert finish(source, out, workers=2) == uninterrupted
            shutil.rmtree(out)
            continue
        kills += 1
        resumed += (out / "progress.json").exists()
    assert resumed >= 3, f"{resumed} of {KILLS} kills left something to go on from"
    assert finish(source, out, workers=2) == uninterrupted


def changed(folder: Path) -> int:
    """When the journal of `folder` was written last, or else its first shard."""
    journal, shard = folder / "progress.json", folder / "train-00000.npy"
    path = journal if journal.exists() else shard
    return path.stat().st_mtime_ns if path.exists() else 0


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
