"""A sweep: paired runs in processes of their own, what is done is skipped, and the cast gap."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from train.cast import cast_gaps
from train.plan import SweepRequest
from train.record import run_status
from train.runs import read_cast_gaps, write_cast_gaps

Fit = Callable[..., int]


def test_the_plan_is_every_recipe_for_every_seed(recipes: Path, tiny: Path) -> None:
    files = (recipes / "bf16.yaml", recipes / "mxint8.yaml")
    plan = SweepRequest(Path("out"), (tiny,), files, (0, 3), {}, ("--a", "1")).runs()
    assert [p.folder.name for p in plan] == ["bf16-s0", "mxint8-s0", "bf16-s3", "mxint8-s3"]
    assert plan[3].command((tiny,))[-6:] == [
        *("--run_dir", "out/mxint8-s3", "--seed_everything", "3", "--a", "1")
    ]


def test_two_recipes_of_one_name_are_refused(recipes: Path) -> None:
    with pytest.raises(ValueError, match="different names"):
        SweepRequest(Path("out"), (), (recipes / "bf16.yaml",) * 2, (0,), {}, ())


def test_cast_gap(fit: Fit, tmp_path: Path) -> None:
    """The baseline against itself is exactly zero; coarser elements cost more."""
    for recipe in ("bf16", "mxint8", "mxfp8"):
        fit(tmp_path / recipe, recipe, "--checkpoint_every", "3")
    gaps = cast_gaps(tmp_path / "bf16", [tmp_path / r for r in ("bf16", "mxint8", "mxfp8")])
    assert gaps["bf16"].mean == gaps["bf16"].standard_error == 0
    assert 0 < abs(gaps["mxint8"].mean) < 0.02
    assert gaps["mxint8"].standard_error < gaps["mxfp8"].standard_error
    assert gaps["mxfp8"].tokens == gaps["mxfp8"].windows * 32
    assert gaps["bf16"].kl == 0 < gaps["mxint8"].kl < gaps["mxfp8"].kl < 0.01  # type: ignore[operator]
    along = gaps["mxfp8"].along
    assert [point["tokens_seen"] for point in along] == [3 * 8 * 32, 6 * 8 * 32]
    assert along[-1]["mean"] == gaps["mxfp8"].mean != along[0]["mean"]
    write_cast_gaps(tmp_path / "bf16", gaps)
    assert read_cast_gaps(tmp_path / "bf16")["mxfp8"].kl == gaps["mxfp8"].kl


@pytest.mark.slow
def test_sweep_and_compare(tmp_path: Path, recipes: Path, tiny_data: Path, tiny: Path) -> None:
    """End to end through the command line, twice: the second call trains nothing."""
    command = [sys.executable, "-P", "-m", "train.cli"]
    sweep = [
        *(*command, "sweep", "--out", "out", "-c", str(tiny), "--recipes"),
        *(str(recipes / f"{name}.yaml") for name in ("bf16", "mxint8")),
        *("--", "--data.path", str(tiny_data)),
    ]
    first = subprocess.run(sweep, cwd=tmp_path, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert {run_status(tmp_path / "out" / f"{n}-s0") for n in ("bf16", "mxint8")} == {"finished"}
    assert set(read_cast_gaps(tmp_path / "out" / "bf16-s0")) == {"bf16", "mxint8"}
    again = subprocess.run(sweep, cwd=tmp_path, capture_output=True, text=True)
    assert again.stdout.count("is finished") == 2
    compare = subprocess.run(
        [*command, "compare", "out"], cwd=tmp_path, capture_output=True, text=True
    )
    assert compare.returncode == 0, compare.stderr
    assert "one seed: no verdict" in compare.stdout
    assert json.loads((tmp_path / "out" / "compare" / "compare.json").read_text())


@pytest.mark.slow
def test_a_failed_run_does_not_stop_the_others(
    tmp_path: Path, recipes: Path, tiny_data: Path, tiny: Path
) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("model: {policy: {name: bad, recipe: {}, skip: [nothing]}}\n")
    command = [
        *(sys.executable, "-P", "-m", "train.cli", "sweep", "--out", "out", "-c", str(tiny)),
        *("--recipes", str(bad), str(recipes / "bf16.yaml")),
        *("--", "--data.path", str(tiny_data), "--trainer.max_steps", "1"),
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert "failed: out/bad-s0" in result.stderr
    assert run_status(tmp_path / "out" / "bf16-s0") == "finished"
