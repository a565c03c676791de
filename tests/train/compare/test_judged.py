"""Several recipes: with which rows a verdict is held together, how often one of them is false."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from train.cli import main
from train.compare.branches import BranchSet
from train.compare.verdicts import judge
from train.stats.strata import estimate

Make = Callable[..., Path]
Gaps = list[float]
GOOD, ONE, LOST, SAME = [0.1, 0.11, 0.12], [0.1], [0.1, math.nan, 0.12], [0.2, 0.2, 0.2]


def run(make_run: Make, out: Path, recipe: str, gaps: Gaps, **info: Any) -> None:
    for seed, gap in enumerate(gaps):
        val = {3: 2.0 + gap}
        folder = out / f"{recipe}-s{seed}"
        make_run(folder, [3.0, 2.0, 1.0], val, recipe=recipe, seed=seed, **info)


def branches(out: Path, **gaps: Gaps) -> None:
    arms = [{"label": x, "recipe": x, "changes": {}, "control": None} for x in ("bf16", *gaps)]
    point = {"path": "bf16-s0/checkpoints/s", "step": 1, "max_steps": 9, "digest": out.name}
    units = [
        {"checkpoint": 0, "branch": b, "seed": b, "validation_windows": 1, "seconds": 1.0,
         "losses": {"bf16": 2.0} | {x: 2 + own[b] for x, own in gaps.items() if b < len(own)}}
        for b in range(3)
    ]  # fmt: skip
    BranchSet("bf16", 5, arms, [point], {}, [], units).write(out)


#: recipes of full runs, sets of branches; rows against the baseline, all pairs, that are judged
FAMILIES: dict[str, tuple[dict[str, Gaps], list[dict[str, Gaps]], int, int]] = {
    "one recipe": ({"a": GOOD}, [], 1, 1),
    "three": ({"a": GOOD, "b": GOOD[::-1], "c": [0.0, 0.1, -0.1]}, [], 3, 6),
    "one diverged": ({"a": GOOD, "b": LOST}, [], 1, 1),
    "one of one seed": ({"a": GOOD, "b": ONE}, [], 1, 1),
    "one without spread": ({"a": GOOD, "b": SAME}, [], 1, 2),  # of b - a there is some
    "branches": ({"a": GOOD}, [{"b": GOOD, "c": [0.0, 0.1, -0.1]}], 3, 4),
    "two sets of branches": ({"a": GOOD}, [{"b": GOOD}, {"b": [0.0, 0.1, -0.1]}], 3, 3),
    "branches, some too few": ({"a": GOOD}, [{"b": GOOD, "c": ONE}], 2, 2),
    "branches alone": ({}, [{"b": GOOD, "c": [0.0, 0.1, -0.1]}], 2, 3),
}


@pytest.mark.parametrize("case", FAMILIES)
def test_rows_that_are_judged_are_those_with_a_verdict(
    case: str, tmp_path: Path, make_run: Make, no_pictures: None,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    recipes, sets, against, pairs = FAMILIES[case]
    run(make_run, tmp_path, "bf16", [0.0, 0.0, 0.0])
    for recipe, gaps in recipes.items():
        run(make_run, tmp_path, recipe, gaps)
    for number, arms in enumerate(sets):
        branches(tmp_path / f"branches{number}", **arms)
    assert main(["compare", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "compare" / "compare.json").read_text())
    assert found["judged"] == {"against the baseline": against, "pairs": pairs}
    rows = [pair for pair in found["pairs"] if pair["a"] == "bf16"]
    rows += [row for one in found["branches"] for row in one["rows"]]
    judged = [row for row in rows if row["verdict"] in ("worse", "better", "not distinguishable")]
    assert len(judged) == against == sum("detectable" in row for row in rows)
    assert {row.get("rows") for row in judged} == {against if against > 1 else None}
    said = f"Verdicts hold together: {against} rows against the baseline (runs and branches)"
    assert (said in " ".join(capsys.readouterr().out.split())) == (pairs > 1)


@pytest.mark.parametrize(("recipes", "arms"), [(5, 0), (5, 4), (0, 6)])
def test_among_all_rows_one_is_false_in_five_percent(recipes: int, arms: int) -> None:
    """Three seeds share a baseline, five branches too. Each alone: a sixth and more are false."""
    rng, draws, together, alone = np.random.default_rng(0), 1000, 0, 0

    def rows(count: int, units: int) -> list[dict[str, Any]]:
        losses = rng.standard_normal((count + 1, units))
        found = (estimate([(own - losses[0]).tolist()]) for own in losses[1:])
        return [asdict(one) | {"a": "bf16", "b": str(i), "verdict": one.verdict}
                for i, one in enumerate(found)]  # fmt: skip

    for _ in range(draws):
        full, short = rows(recipes, 3), rows(arms, 5)
        alone += any(row["verdict"] != "not distinguishable" for row in (*full, *short))
        judge({"baseline": "bf16", "pairs": full, "branches": [{"rows": short, "pairs": []}]})
        together += any(row["verdict"] != "not distinguishable" for row in (*full, *short))
    assert together / draws < 0.065 < 0.14 < alone / draws
