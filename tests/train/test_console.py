"""What a command prints is ours alone, with the test extra (torchao) installed."""

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from train.cli import VERBS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="no torchao"),
]
PROGRAM = "import sys; from train.cli import main; sys.exit(main())"  # the script `lowbit`
HELP = """
import sys
from train.cli import VERBS, main
for verb in VERBS:
    sys.argv[1:] = [verb, "--help"]
    try:
        main()
    except SystemExit as end:
        assert not end.code
"""


def lowbit(*arguments: object, program: str = PROGRAM) -> tuple[str, list[str]]:
    """What the command prints."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout, ended.stderr.splitlines()


def test_help_of_every_verb() -> None:
    """In one process, where each verb's imports might warn."""
    out, errors = lowbit(program=HELP)
    assert not errors
    assert [line.split()[2] for line in out.splitlines() if line.startswith("usage: lowbit ")] == [
        *VERBS
    ]


def test_a_run_its_branches_and_its_evaluation(
    tiny: Path, tiny_data: Path, recipes: Path, tmp_path: Path
) -> None:
    bf16, run = recipes / "bf16.yaml", tmp_path / "bf16-s0"
    layers = ("-c", tiny, "-c", bf16, "--data.path", tiny_data, "--run_dir", run)
    point = run / "checkpoints" / "step-00000001"
    steps = ("--trainer.max_steps", 2, "--trainer.val_check_interval", 1, "--checkpoint_every", 1)
    out, errors = lowbit("fit", *layers, *steps)
    assert all(line.startswith("training: ") for line in errors if line)  # states of one bar
    with (run / "metrics.csv").open(newline="") as file:
        *_, last = (float(row["val/loss"]) for row in csv.DictReader(file))
    ours = [line for line in out.splitlines() if not line.startswith("slow: ")]  # of the machine
    assert ours == [
        f"{run}:",
        "0.1 M parameters, 0 of 15 linear layers quantized under bf16",
        "  model.layers.0-1.self_attn.{q_proj,k_proj,v_proj,o_proj}",
        "  model.layers.0-1.mlp.{gate_proj,up_proj,down_proj}",
        "  lm_head",
        "    all six operands: bf16",
        "",
        f"val loss {last:.4f}, 2 steps done; weights in {run}/hf",
    ]
    arms = ("--horizon", 1, "--branches", 2, "--jobs", 2, "--recipes", bf16)
    out, errors = lowbit("sweep", "--out", tmp_path / "out", "--branch-from", point, *arms)
    assert not errors and out.startswith("1 of 2 branches of 1 checkpoints, ")
    out, errors = lowbit("eval", run, "--formats", "mxint8", "--windows", 2, "--seq-len", 64)
    assert not errors and out.startswith("model: ")
