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

    with start(tmp_path / "whole") as process:
        process.communicate()
    rng, out = random.Random(0), tmp_path / "out"
    for is_killed in (*3 * [True], False):
        if out.exists():  # the last kill came when all was done
            break
        with start(out) as process:
            assert process.stdout is not None
            if is_killed:
                process.stdout.readline()  # a block is finished, or all are
                time.sleep(rng.uniform(0, 0.3))
                process.kill()
            process.stdout.read()
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in out.iterdir())
    for name in files:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not out.with_name("out.partial").exists()
