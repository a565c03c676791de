"""Launching: what is wrong is said before anything starts, and nothing outlives its launcher."""

import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy

from lowbit import Keep
from train.checkpoints.folder import complete_checkpoints
from train.distributed.ranks import check_strategy

Fit = Callable[..., int]
SCRIPTS = Path(__file__).parents[3] / "scripts"
TWO = ("--trainer.strategy", "ddp", "--trainer.devices", "2")


def test_port_in_use(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 at once, before the second process is started or anything written."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        assert fit(tmp_path / "run", "bf16", *TWO) == 2
    assert f"the rendezvous port {port} cannot be used (Address already" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_missing_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    strategy = DDPStrategy(
        parallel_devices=[torch.device("cuda", 0)], cluster_environment=LightningEnvironment()
    )
    with pytest.raises(ValueError, match="has no NCCL"):
        check_strategy(SimpleNamespace(strategy=strategy), Keep())  # type: ignore[arg-type]


def test_kept_weights_under_fsdp2(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--trainer.strategy", "fsdp2", "--model.keep.quantized_weights", "true")
    assert fit(tmp_path / "run", "mxint8", *arguments) == 2
    assert "model.keep.quantized_weights with fsdp2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_precision_that_fsdp2_does_not_have(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--trainer.strategy", "fsdp2", "--trainer.precision", "bf16-true")
    assert fit(tmp_path / "run", "bf16", *arguments) == 2
    assert "precision=bf16-true: expected one of" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"PROCESSES": "4"}, "--standalone --nproc-per-node 4"),
        ({"PROCESSES": "8", "NODES": "2", "HEAD": "a:29500"},
         "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint a:29500 --nproc-per-node 8"),
    ],
)  # fmt: skip
def test_the_torchrun_script(environment: dict[str, str], expected: str, tmp_path: Path) -> None:
    said = said_by("launch_torchrun.sh", "torchrun", tmp_path, environment)
    assert said.startswith(expected)
    nodes, processes = environment.get("NODES", "1"), environment["PROCESSES"]
    last = f"fit -c a b --trainer.devices {processes} --trainer.num_nodes {nodes}"
    assert said.strip().endswith(last)


def test_the_slurm_script(tmp_path: Path) -> None:
    counts = {"SLURM_CPUS_PER_TASK": "8", "SLURM_NTASKS_PER_NODE": "8", "SLURM_NNODES": "2"}
    said = said_by("slurm.sbatch", "srun", tmp_path, counts)
    assert said.strip() == (
        "--kill-on-bad-exit=1 lowbit fit -c a b --trainer.devices 8 --trainer.num_nodes 2"
    )
    assert "#SBATCH --signal=USR1@" in (SCRIPTS / "slurm.sbatch").read_text()


def said_by(script: str, launcher: str, folder: Path, environment: dict[str, str]) -> str:
    """The arguments with which `script` calls its launcher."""
    for name in (launcher, "lowbit"):
        (folder / name).write_text('#!/bin/sh\necho "$@"\n')
        (folder / name).chmod(0o755)
    path = {"PATH": f"{folder}:{os.environ['PATH']}"}
    command = ["bash", str(SCRIPTS / script), "-c", "a b"]
    return subprocess.check_output(command, env=os.environ | path | environment, text=True)


@pytest.mark.slow
def test_launcher_sigkilled_under_torchrun(
    fit: Fit, tmp_path: Path, tiny: Path, recipes: Path, tiny_data: Path
) -> None:
    """Both workers end by themselves, and one process goes on from what they have saved."""
    run = tmp_path / "run"
    arguments = ["-c", str(tiny), "-c", str(recipes / "bf16.yaml"), "--data.path", str(tiny_data)]
    arguments += ["--run_dir", str(run), "--trainer.max_steps", "100000", "--checkpoint_every", "1"]
    arguments += ["--trainer.strategy", "fsdp2", "--trainer.val_check_interval", "1000000"]
    environment = os.environ | {"PROCESSES": "2", "OMP_NUM_THREADS": "1"}
    command = [str(SCRIPTS / "launch_torchrun.sh"), *arguments]
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment, **quiet) as launcher:
        wait_until(lambda: len(complete_checkpoints(run / "checkpoints")) > 1, 120)
        workers = children(launcher.pid)
        launcher.kill()
    assert len(workers) == 2
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 60)
    saved = complete_checkpoints(run / "checkpoints")[-1]
    last = str(int(saved.name[5:]) + 1)
    same = ("--trainer.val_check_interval", "1000000", "--checkpoint_every", "1")
    assert fit(run, "bf16", "--trainer.max_steps", last, *same) == 0
    assert complete_checkpoints(run / "checkpoints")[-1].name == f"step-{int(last):08d}"


def children(pid: int) -> list[int]:
    """Of all its threads."""
    lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for text in lists for child in text.split()]


def wait_until(reached: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)
