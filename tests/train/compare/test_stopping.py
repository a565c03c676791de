"""`--target-se`: what is stopped by its spread keeps the first stage's, wherever it is judged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from train.cli import main
from train.compare.branches import BranchSet
from train.compare.stopping import Stopping, read_stopping, write_stopping
from train.stats.intervals import t_quantile
from train.stats.strata import estimate, units_needed

Make = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("no_pictures")
FIRST, MORE = [0.01, 0.02, 0.03, 0.04], [0.02, 0.021, 0.019]  # later ones that agree too well


def runs(make_run: Make, out: Path, gaps: dict[int, float], recipe: str = "x") -> None:
    for seed, gap in gaps.items():
        if not (out / f"bf16-s{seed}").exists():
            make_run(out / f"bf16-s{seed}", [3.0, 2.0, 1.0], {3: 2.0}, seed=seed)
        val = {3: 2.0 + gap}
        make_run(out / f"{recipe}-s{seed}", [3.0, 2.0, 1.0], val, recipe=recipe, seed=seed)


def document(folder: Path, *more: str, code: int = 0) -> dict[str, Any]:
    assert main(["compare", str(folder), *more]) == code
    found: dict[str, Any] = json.loads((folder / "compare" / "compare.json").read_text())
    return found


def check_first_stage(row: dict[str, Any], gaps: list[float]) -> None:
    """Student's t of four gaps, over the square root of all."""
    error = np.std(FIRST, ddof=1) / len(gaps) ** 0.5
    assert row["mean"] == pytest.approx(np.mean(gaps))
    assert (row["standard_error"], row["freedom"]) == (pytest.approx(error), pytest.approx(3))
    assert row["high"] - row["mean"] == pytest.approx(t_quantile(0.975, 3) * error)


@pytest.mark.parametrize("more", [[], MORE[:1], MORE])
def test_seeds_keep_the_first_stages_spread(
    tmp_path: Path, make_run: Make, more: list[float]
) -> None:
    """In runs against the baseline and against each other; a later call does not move the stage."""
    gaps = [*FIRST, *more]
    runs(make_run, tmp_path, dict(enumerate(gaps)))
    runs(make_run, tmp_path, dict(enumerate([-gap for gap in gaps])), recipe="y")
    write_stopping(tmp_path, Stopping(0.01, (0, 1, 2, 3)))
    write_stopping(tmp_path, Stopping(0.001, (3, 4, 5, 6)))
    assert read_stopping(tmp_path) == Stopping(0.01, (0, 1, 2, 3))
    found = {(pair["a"], pair["b"]): pair for pair in document(tmp_path)["pairs"]}
    check_first_stage(found["bf16", "x"], gaps)
    assert found["x", "y"]["standard_error"] == pytest.approx(
        2 * found["bf16", "x"]["standard_error"]
    )


def test_branches_keep_it_too(tmp_path: Path, make_run: Make) -> None:
    gaps = [*FIRST, *MORE]
    make_run(tmp_path / "bf16-s0", [3.0, 2.0, 1.0], {3: 2.0})
    arms = [{"label": x, "recipe": x, "changes": {}, "control": None} for x in ("bf16", "x", "y")]
    point = {"path": "bf16-s0/checkpoints/s", "step": 1, "max_steps": 9, "digest": "d"}
    units = [
        {"checkpoint": 0, "branch": b, "seed": b, "validation_windows": 1, "seconds": 1.0,
         "losses": {"bf16": 2.0, "x": 2 + gap, "y": 2 - gap}} for b, gap in enumerate(gaps)
    ]  # fmt: skip
    found = BranchSet("bf16", 5, arms, [point], {}, [], units, first_stage=4)
    found.write(tmp_path / "branches")
    (branches,) = document(tmp_path)["branches"]
    check_first_stage(branches["rows"][0], gaps)
    assert branches["pairs"][0]["freedom"] == pytest.approx(3)


@pytest.mark.parametrize(("lost", "left"), [((0, 1, 2), 1), ((0, 1, 2, 3), 0)])
def test_without_its_first_stage_there_is_no_verdict(
    tmp_path: Path, make_run: Make, lost: tuple[int, ...], left: int
) -> None:
    """The spread of the others is not the one that their number followed; no bound passes."""
    kept = {s: gap for s, gap in enumerate([*FIRST, *MORE]) if s not in lost}
    runs(make_run, tmp_path, kept)
    write_stopping(tmp_path, Stopping(0.01, (0, 1, 2, 3)))
    (pair,) = document(tmp_path, "--max-gap", "9", code=1)["pairs"]
    assert pair["verdict"] == f"{left} of the first stage's 4 seeds left: no verdict"
    assert pair["low"] is None


def test_the_rule_is_false_as_often_as_it_says_and_looking_after_each_seed_is_not() -> None:
    rng, draws, target = np.random.default_rng(0), 3000, 0.25
    noise = rng.standard_normal((draws, 10))
    stein = peeked = 0
    for gaps in noise:
        n = min(10, max(4, units_needed([[gaps[:4].tolist()]], target)))
        stein += estimate([gaps[:n].tolist()], first=4).verdict != "not distinguishable"
        errors = ((k, gaps[:k].std(ddof=1) / k**0.5) for k in range(3, 11))
        n = next((k for k, error in errors if error <= target), 10)
        peeked += estimate([gaps[:n].tolist()]).verdict != "not distinguishable"
    assert 0.04 < stein / draws < 0.06 < 0.075 < peeked / draws
