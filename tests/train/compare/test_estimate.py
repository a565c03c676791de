"""Branch estimates: strata are given, units within them are noise; what compare makes of them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from train.cli import main
from train.compare.branches import BranchSet, read_branches
from train.stats.intervals import t_quantile
from train.stats.strata import estimate, units_needed
from train.sweep.target import second_stage

Make = Callable[..., Path]


def test_one_stratum_is_the_ordinary_interval() -> None:
    gaps = [0.1, 0.4, 0.3, -0.2]
    found = estimate([gaps])
    error = np.std(gaps, ddof=1) / 2
    assert found.mean == pytest.approx(0.15) and found.standard_error == pytest.approx(error)
    assert found.high == pytest.approx(0.15 + t_quantile(0.975, 3) * error)


def test_what_checkpoints_differ_by_is_no_noise() -> None:
    """Two checkpoints with effects 1 and 3, each known to 0.1: the mean is 2, known to 0.1/√2."""
    spread = 0.1 * np.sqrt(1.5)
    strata = [[1 - spread, 1.0, 1 + spread], [3 - spread, 3.0, 3 + spread]]
    found = estimate(strata)
    assert found.mean == pytest.approx(2)
    assert found.standard_error == pytest.approx(spread / np.sqrt(3) / np.sqrt(2))


@pytest.mark.parametrize("spreads", [(1, 1, 1), (1, 3, 9), (1, 1, 5)])
def test_intervals_over_strata_cover(spreads: tuple[int, ...]) -> None:
    """However much the checkpoints' spreads differ; pooled they were false in 12 to 36 %."""
    rng = np.random.default_rng(0)
    effects = np.array([0.001, 0.004, -0.002])
    covered = 0
    for _ in range(1000):
        drawn = zip(effects, spreads, strict=True)
        found = estimate([rng.normal(effect, 0.003 * s, 4).tolist() for effect, s in drawn])
        assert found.low is not None and found.high is not None
        covered += found.low <= effects.mean() <= found.high
    assert covered >= 925


def test_every_stratum_has_its_own_spread() -> None:
    """Welch and Satterthwaite, by hand: variances 1 and 9 of three units each."""
    found = estimate([[-1.0, 0.0, 1.0], [-3.0, 0.0, 3.0]])
    assert found.standard_error == pytest.approx(np.sqrt((1 / 3 + 9 / 3) / 4))
    assert found.freedom == pytest.approx((1 + 9) ** 2 / (1 / 2 + 81 / 2))
    assert "one unit of a checkpoint" in estimate([[1.0, 2.0, 3.0], [4.0]]).verdict


def test_the_second_stage_is_steins(capsys: pytest.CaptureFixture[str]) -> None:
    few = [0.0, 0.002, 0.004, 0.006]  # variance 6.67e-6: a standard error of 1e-3 takes 7
    assert units_needed([[few]], 1e-3) == 7
    assert second_stage({"x": [few], "y": [[0.0, 1e-9, 0.0, 0.0]]}, 1e-3, 10, "seeds") == 7
    assert "0.001 takes 7" in capsys.readouterr().out
    assert second_stage({"x": [few]}, 1e-3, 5, "seeds") == 5
    assert "is not reached: it takes 7" in capsys.readouterr().out
    assert second_stage({"x": [few]}, 1.0, 10, "seeds") == 4
    later = estimate([[*few, 5.0, -5.0, 0.0]], first=4)  # whose spread does not count
    assert later.standard_error == pytest.approx(np.std(few, ddof=1) / np.sqrt(7))
    assert later.freedom == pytest.approx(3) and later.mean == pytest.approx(0.012 / 7)
    with pytest.raises(ValueError, match="--target-se 0: expected a positive number"):
        second_stage({}, 0, 3, "seeds")


@pytest.fixture
def branches() -> BranchSet:
    arms: list[dict[str, Any]] = [
        {"label": label, "recipe": f"{label}.yaml", "changes": {}, "control": control}
        for label, control in (("bf16", None), ("x", None), ("p", "perturbed"))
    ]
    points = [{"path": f"c{i}", "step": 10 * i, "max_steps": 30, "digest": str(i)} for i in (1, 2)]
    units = [
        {"checkpoint": c, "branch": b, "seed": b, "validation_windows": 4, "seconds": 1.5,
         "losses": {"bf16": 2.0, "x": 2.25 + 0.125 * b, "p": None if b == 2 else 2.0}}
        for c in (0, 1) for b in (0, 1, 2)
    ]  # fmt: skip
    return BranchSet("bf16", 5, arms, points, {"commit": None}, ["lowbit sweep"], units)


def test_compare_shows_branches_beside_full_runs(
    tmp_path: Path, make_run: Make, branches: BranchSet, capsys: pytest.CaptureFixture[str],
    no_pictures: None,
) -> None:  # fmt: skip
    make_run(tmp_path / "bf16-s0", [3.0, 2.0], {2: 2.5})
    branches.write(tmp_path / "branches-h5")
    assert read_branches(tmp_path / "branches-h5") == branches
    assert main(["compare", str(tmp_path)]) == 0
    (found,) = json.loads((tmp_path / "compare" / "compare.json").read_text())["branches"]
    x, p = found["rows"]
    assert (x["mean"], x["units"], x["checkpoint_means"]) == (0.375, 6, [0.375, 0.375])
    assert x["verdict"] == "worse" and p["verdict"] == "2 of 6 diverged: no verdict"
    assert (p["diverged"], p["units"]) == (2, 4)
    assert p["lost"][0] == "p from step 10, branch 2"
    assert (x["checkpoint_units"], x["like_these"]["low"]) == ([3, 3], None)
    (pair,) = found["pairs"]
    assert (pair["a"], pair["b"], pair["verdict"]) == ("x", "p", p["verdict"])
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "Valid for these checkpoints (step 10 of 30, step 20 of 30) and this horizon (5 steps)"
        in out
    )
    assert "x +0.37500" in out and "p (control) +0.00000" in out


def test_branches_alone_are_refused(tmp_path: Path, branches: BranchSet) -> None:
    branches.write(tmp_path)
    assert main(["compare", str(tmp_path)]) == 2


LOST: dict[str, Callable[[dict[str, Any]], bool]] = {
    "some branches of an arm": lambda unit: unit["branch"] == 2,
    "all branches of one checkpoint": lambda unit: unit["checkpoint"] == 1,
    "all branches of an arm": lambda unit: True,
}


@pytest.mark.parametrize("case", LOST)
@pytest.mark.parametrize("label", ["x", "bf16"])
def test_diverged_branches_take_the_verdict_with_them(
    tmp_path: Path, make_run: Make, branches: BranchSet, case: str, label: str,
    no_pictures: None, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Whichever of the two arms they are of; the comparison is written all the same."""
    lost = [unit for unit in branches.units if LOST[case](unit)]
    for unit in lost:
        unit["losses"][label] = None
    make_run(tmp_path / "bf16-s0", [3.0, 2.0], {2: 2.5})
    make_run(tmp_path / "x-s0", [3.0, 2.0], {2: 2.5}, recipe="x")
    branches.write(tmp_path / "branches-h5")
    assert main(["compare", str(tmp_path), "--max-gap", "9"]) == 1
    (found,) = json.loads((tmp_path / "compare" / "compare.json").read_text())["branches"]
    row = found["rows"][0]
    assert row["verdict"] == f"{len(lost)} of 6 diverged: no verdict"
    assert len(row["lost"]) == len(lost) == row["diverged"]
    out = " ".join(capsys.readouterr().out.split())
    assert f"Diverged: {label} from step" in out and "FAILED --max-gap 9.0: x, branches" in out


@pytest.mark.parametrize("paths", [("c1", "c1"), ("c1", "copy/c1"), ("./c1", "c1")])
def test_one_checkpoint_given_twice_is_refused(
    tmp_path: Path, branches: BranchSet, paths: tuple[str, str]
) -> None:
    """As it is, copied, or by another spelling: by what is in it."""
    for checkpoint, path in zip(branches.checkpoints, paths, strict=True):
        checkpoint |= {"path": path, "digest": "same"}
    branches.write(tmp_path)
    with pytest.raises(ValueError, match="hold the same checkpoint"):
        read_branches(tmp_path)


def test_two_branches_of_a_checkpoint_are_too_few(branches: BranchSet) -> None:
    few = replace(branches, units=[unit for unit in branches.units if unit["branch"] < 2])
    x, _ = few.rows()
    assert x["verdict"] == "2 branches of a checkpoint: no verdict" and x["low"] is not None


def test_runs_are_the_units_of_checkpoints_like_these(branches: BranchSet) -> None:
    """Six checkpoints of three runs: two of a run count once."""
    points = [
        {"path": f"r{i // 2}/checkpoints/s{i}", "step": i, "max_steps": 9, "digest": f"{i}"}
        for i in range(6)
    ]
    rng = np.random.default_rng(0)
    units = [
        {"checkpoint": c, "branch": b, "seed": b, "validation_windows": 4, "seconds": 1.0,
         "losses": {"bf16": 2.0, "x": 2.0 + rng.normal(), "p": 2.0}}
        for c in range(6) for b in range(3)
    ]  # fmt: skip
    found = replace(branches, checkpoints=points, units=units)
    x, _ = found.rows()
    means = np.mean(np.reshape([np.mean(s) for s in found.gaps()["x"]], (3, 2)), axis=1)
    like = x["like_these"]
    assert like["freedom"] == pytest.approx(2) and like["units"] == 3
    assert like["standard_error"] == pytest.approx(np.std(means, ddof=1) / 3**0.5)
