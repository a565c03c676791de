"""SIGKILL at any instant, and a rerun: the same bytes."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.slow
def test_killed_and_run_again(make_model: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    model = make_model(num_hidden_layers=6)
    where = ["--text", str(text), "--tokenizer", "bytes", "--windows", "4", "--seq-len", "48"]
    flags = ["--format", "nvfp4", "--activations", "nvfp4", "--inputs", "quantized"]

    def start(out: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "train.cli", "quantize", str(model), str(out)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*command, *where, *flags], stdout=subprocess.PIPE, text=True, env=environment
        )

    assert start(tmp_path / "whole").wait() == 0
    rng, out, kills = random.Random(0), tmp_path / "out", 0
    while True:
        process = start(out)
        assert process.stdout is not None
        if kills < 5:
            process.stdout.readline()  # a block is finished, or all are
            time.sleep(rng.uniform(0, 0.6))
            process.kill()
            kills += 1
        process.stdout.read()
        if process.wait() == 0:
            break
        assert not out.exists() or kills == 5
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in out.iterdir())
    for name in files:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not out.with_name("out.partial").exists()
