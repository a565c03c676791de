"""scripts/: what runs all tests runs all of them."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.mark.parametrize("failing", ["", "1", "2", "1 2"])
def test_every_tier_runs_whatever_failed_before(tmp_path: Path, failing: str) -> None:
    """A `pytest` that fails at the calls whose numbers are in `failing`."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPTS / "test.sh", tmp_path / "scripts")
    (tmp_path / "scripts" / "environment.sh").write_text("set -euo pipefail\n")
    fake = tmp_path / "pytest"
    fake.write_text(
        '#!/bin/sh\necho "$*" >> calls\n'
        f"for n in {failing}; do [ $n != $(wc -l < calls) ] || exit 1; done\n"
    )
    fake.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended = subprocess.run(
        ["scripts/test.sh", "-x"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == bool(failing)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 2 and all(call.endswith("-x") for call in calls)
    assert ended.stderr.count("test.sh: failed:") == len(failing.split())


#: arguments of scripts/results.sh, and what `lowbit` is called with or the script ends by
RESULTS: dict[str, str] = {
    "base": "--spec configs/sweep/ladder_base.yaml --out runs/ladder --jobs 2 --seeds 0 1 2 --\n",
    "--device cuda base": "ladder-cuda --jobs 2 --seeds 0 1 2 -- --trainer.accelerator cuda\n",
    "--model 145m --data d --tokens 83886080 base": (
        "-c configs/model/145m.yaml -c configs/trainer/quickstart.yaml --out runs/ladder-145m"
        " --jobs 2 --seeds 0 1 2 -- --trainer.max_steps 160 --trainer.val_check_interval 40"
        " --checkpoint_every 80 --data.path d"
    ),
    "disputes": (
        " runs/ladder/bf16-s0/checkpoints/step-00000160"
        " runs/ladder/bf16-s1/checkpoints/step-00000160"
        " runs/ladder/bf16-s2/checkpoints/step-00000160 --horizon 20 --branches 3 --jobs 2 --spec"
        " configs/sweep/disputes.yaml"
    ),
    "--model 145m --tokens 1000 base": "half of them are 0 steps, branches take 20",
    "--model 9b base": "--model 9b: there is no configs/model/9b.yaml",
    "--device tpu": "--device tpu: cpu or cuda",
    "--devise cuda": "no option --devise",
    "branch": "no stage branch",
}


@pytest.mark.parametrize("arguments", RESULTS)
def test_results_calls_what_it_says(tmp_path: Path, arguments: str) -> None:
    """With a `lowbit` that writes down how it is called."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPTS / "results.sh", tmp_path / "scripts")
    shutil.copytree(SCRIPTS.parent / "configs" / "model", tmp_path / "configs" / "model")
    (tmp_path / "scripts" / "environment.sh").write_text("set -euo pipefail\n")
    fake = tmp_path / "lowbit"
    fake.write_text('#!/bin/sh\necho "$*" >> calls\n')
    fake.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended = subprocess.run(
        ["bash", "scripts/results.sh", *arguments.split()],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    calls = tmp_path / "calls"
    refused = not RESULTS[arguments].startswith(("-c", "--spec", "ladder-", " "))
    assert ended.returncode == (2 if refused else 0), ended.stderr
    assert RESULTS[arguments] in (ended.stderr if refused else calls.read_text())
    assert calls.exists() != refused
