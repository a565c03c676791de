"""On CUDA devices: every recipe trains, and two NCCL ranks resume. Run by scripts/check_gpu.sh."""

import csv
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "configs" / "recipe").glob("*.yaml"))
DEVICE, PROCESSES = "gpu", torch.cuda.device_count()
Fit = Callable[..., int]
# the blocks of 256 of a recipe divide it
WIDE = {
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file)]


@pytest.mark.filterwarnings("ignore:GPU available but not used")
@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_trains(recipe: str, fit: Fit, tmp_path: Path) -> None:
    """From the CPU's initial weights; the first loss is the CPU's but for BF16's roundings."""
    wide = [part for key, value in WIDE.items() for part in (f"--model.llama.{key}", str(value))]
    one = (*wide, "--trainer.max_steps", "1", "--trainer.devices", "1", "--trainer.accelerator")
    assert fit(tmp_path / "gpu", recipe, *one, DEVICE) == 0
    assert fit(tmp_path / "cpu", recipe, *one, "cpu") == 0
    records = [json.loads((tmp_path / n / "run.json").read_text()) for n in ("gpu", "cpu")]
    assert records[0]["initial_weights"] == records[1]["initial_weights"]
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-2)


@pytest.mark.skipif(PROCESSES < 2, reason="one GPU")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_nccl_ranks_resume_bit_for_bit(
    strategy: str,
    tmp_path: Path,
    tiny: Path,
    tiny_data: Path,
    recipes: Path,
    assert_same_run: Callable[..., None],
) -> None:
    """Deterministic algorithms; four steps at once, and two and two."""

    def launch(run: str, steps: int) -> None:
        arguments = ["-c", str(tiny), "-c", str(recipes / "mxint8.yaml"), "--checkpoint_every", "2"]
        arguments += ["--data.path", str(tiny_data), "--run_dir", str(tmp_path / run)]
        arguments += ["--trainer.accelerator", DEVICE, "--trainer.strategy", strategy]
        arguments += ["--trainer.deterministic", "true", "--trainer.max_steps", str(steps)]
        arguments += ["--model.optimization.min_lr_ratio", "1.0"]  # no schedule that ends at 2
        script = str(ROOT / "scripts" / "launch_torchrun.sh")
        subprocess.run([script, *arguments], check=True, env=os.environ | {"PROCESSES": "2"})

    launch("whole", 4)
    for steps in (2, 4):
        launch("parts", steps)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
