"""What a run says of its own slowness, cause by cause."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowbit import bf16, kernels
from train.fit.slow import Facts, busy_cores, slow_lines

GOOD = Facts(
    on_cpu=True, in_bf16=True, products="native", has_unit=True, kernels_off=False, threads=8,
    processes=1, cores=8, busy=0.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"kernels_off": True}, ["LOWBIT_KERNELS=off"]),
        ({"has_unit": False}, ["LOWBIT_BF16=auto"]),
        ({"has_unit": False, "in_bf16": False}, []),  # no BF16 matrix is multiplied
        ({"has_unit": False, "products": "fp32"}, ["no BF16 unit.*LOWBIT_BF16"]),
        ({"products": "fp32"}, ["LOWBIT_BF16=fp32 leaves"]),
        ({"threads": 1}, ["1 of 8 cores.*OMP_NUM_THREADS=8"]),
        ({"threads": 4, "processes": 2}, []),
        ({"threads": 1, "processes": 2}, ["2 of 8 cores.*OMP_NUM_THREADS=4"]),
        ({"threads": 5}, []),
        ({"threads": 1, "cores": 1}, []),
        ({"busy": 3.0}, ["3.0 of 8 cores.*OMP_NUM_THREADS=5"]),
        ({"busy": 3.0, "threads": 5}, []),  # there is room for both
        ({"busy": 0.3}, []),
        ({"busy": 9.0}, ["OMP_NUM_THREADS=1"]),
        ({"on_cpu": False, "threads": 1, "busy": 8.0, "has_unit": False}, []),
        ({"on_cpu": False, "kernels_off": True}, ["LOWBIT_KERNELS=off"]),
        ({"has_unit": False, "threads": 1, "kernels_off": True}, ["KERNELS", "BF16", "THREADS"]),
    ],
)
def test_each_cause_has_its_line(change: dict[str, Any], said: list[str]) -> None:
    lines = slow_lines(replace(GOOD, **change))
    assert len(lines) == len(said)
    for line, pattern in zip(lines, said, strict=True):
        assert re.search(pattern, line)
        assert line.startswith("slow: ") and len(line) <= 200


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc/stat")
def test_another_process_is_seen() -> None:
    core = min(os.sched_getaffinity(0))
    spin = f"import os; os.sched_setaffinity(0, {{{core}}})\nprint(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        try:
            assert busy_cores() > 0.1
        finally:
            other.kill()


def test_a_run_says_it_before_its_first_step(
    fit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with bf16.using("fp32"), kernels.using("off"):
        assert fit(tmp_path / "run", "mxint8", "--trainer.max_steps", "1") == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("slow: ")]
    assert sum("LOWBIT_BF16" in x for x in lines) == sum("KERNELS=off" in x for x in lines) == 1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["bf16_products"] == "fp32"
