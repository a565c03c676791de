"""`--pairs`: the questions asked in advance are what is judged; casts beside branches."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from train.cli import main
from train.compare.branch_casts import CastSet
from train.compare.branches import BranchSet
from train.stats.several import holm

Make = Callable[..., Path]
LABELS = ("bf16", "int8", "fp8", "int4", "fp4")


@pytest.fixture
def sweep(tmp_path: Path, make_run: Make, no_pictures: None) -> Path:
    """One run of the baseline, and branches of five arms with gaps of their own."""
    make_run(tmp_path / "bf16-s0", [3.0, 2.0], {2: 2.5})
    arms = [{"label": x, "recipe": x, "changes": {}, "control": None} for x in LABELS]
    points = [{"path": "bf16-s0/checkpoints/s", "step": 1, "max_steps": 9, "digest": "d"}]
    rng = np.random.default_rng(0)
    units = [
        {"checkpoint": 0, "branch": b, "seed": b, "validation_windows": 4, "seconds": 1.0,
         "losses": {x: 2 + 0.01 * i + 0.004 * rng.normal() for i, x in enumerate(LABELS)}}
        for b in range(5)
    ]  # fmt: skip
    BranchSet("bf16", 5, arms, points, {}, [], units).write(tmp_path / "branches")
    return tmp_path


def document(sweep: Path, *more: str) -> dict[str, Any]:
    assert main(["compare", str(sweep), *more]) == 0
    found: dict[str, Any] = json.loads((sweep / "compare" / "compare.json").read_text())
    return found


def test_only_the_planned_pairs_are_judged(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every = document(sweep)
    found = document(sweep, "--pairs", "int8:fp8", "fp4:int4")
    rows, pairs = found["branches"][0]["rows"], found["branches"][0]["pairs"]
    assert [(row["b"], row["a"]) for row in pairs] == [("int8", "fp8"), ("fp4", "int4")]
    assert found["judged"] == {"against the baseline": 4, "pairs": 6}
    assert every["judged"]["pairs"] == 10
    adjusted = holm([row["p"] for row in (*rows, *pairs)])
    assert [row["p_holm"] for row in pairs] == adjusted[4:]
    (same,) = [
        row for row in every["branches"][0]["pairs"] if (row["a"], row["b"]) == ("int8", "fp8")
    ]
    assert pairs[0]["mean"] == pytest.approx(-same["mean"])
    assert rows == every["branches"][0]["rows"]
    assert "with those of --pairs alone, the 6 pairs by Holm" in " ".join(
        capsys.readouterr().out.split()
    )
    assert "--pairs int8:fp8 fp4:int4" in found["command"]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("int8", "'int8', expected A:B"),
        ("int8:int8", "'int8:int8', expected A:B"),
        ("int8:fp8:int4", "'int8:fp8:int4', expected A:B"),
        (":fp8", "':fp8', expected A:B"),
        ("int8:fp9", "--pairs int8:fp9: expected two of bf16, fp4, fp8, int4, int8"),
    ],
)
def test_pairs_that_are_none_are_refused(
    sweep: Path, pair: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["compare", str(sweep), "--pairs", pair])
    except SystemExit as ended:  # argparse's
        assert ended.code == 2
    else:
        assert code == 2
    assert message in capsys.readouterr().err and not (sweep / "compare").exists()


def test_casts_stand_beside_the_branches(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    windows = {"ids": [*range(12)], "documents": [0] * 12}
    columns = {"gap": [1e-4, -1e-4] * 6, "kl": [1e-5, 3e-5] * 6}
    unit = {"checkpoint": 0, "digest": "d", "windows": windows, "values": {"int8": columns}}
    CastSet("bf16").with_unit(unit).write(sweep / "branches")
    (row,) = document(sweep)["branches"][0]["casts"]
    assert (row["recipe"], row["windows"], row["kl"]["mean"]) == ("int8", 12, pytest.approx(2e-5))
    assert "int8 +0.00000 ± " in " ".join(capsys.readouterr().out.split())
