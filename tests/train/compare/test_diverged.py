"""Arms that diverge are shown, and in nobody's way."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from train.cli import main
from train.compare.branches import BranchSet

Loss = float | str | None
LABELS = ("bf16", "a", "b")

BRANCHES: dict[str, Callable[[str, int], float | None]] = {
    "an arm everywhere": lambda label, branch: None if label == "a" else 3 + branch / 64,
    "both arms": lambda label, branch: None if label != "bf16" else 3 + branch / 64,
    "the baseline": lambda label, branch: None if label == "bf16" else 3 + branch / 64,
    "all": lambda label, branch: None,
    "an arm, in all branches but one": lambda label, branch: (
        None if label == "a" and branch else 3 + branch / 64
    ),
    "an arm that is only just finite": lambda label, branch: 3e38 if label == "a" else 3.0,
}


def branches(folder: Path, loss: Callable[[str, int], float | None], checkpoints: int) -> None:
    arms = [{"label": x, "recipe": x, "changes": {}, "control": None} for x in LABELS]
    points = [
        {"path": f"r{c}/checkpoints/step-00000003", "step": 3, "max_steps": 6, "digest": str(c)}
        for c in range(checkpoints)
    ]
    units = []
    for checkpoint in range(checkpoints):
        for branch in range(4):
            losses = {label: loss(label, branch) for label in LABELS}
            units.append({
                "checkpoint": checkpoint, "branch": branch, "seed": branch,
                "validation_windows": 4, "seconds": 1.0, "losses": losses,
                "windows": {"ids": [0, 1, 2, 3], "documents": [0, 0, 1, 1]},
                "window_losses": {k: None if v is None else [v] * 4 for k, v in losses.items()},
            })  # fmt: skip
    BranchSet("bf16", 2, arms, points, {"versions": {}}, ["lowbit"], units).write(folder)


@pytest.mark.parametrize(("lost", "checkpoints"), [*zip(BRANCHES, (1, 3) * 3, strict=True)])
def test_branches_that_diverge(
    lost: str, checkpoints: int, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    make_run(tmp_path / "s/bf16-s0", [3.0, 2.0], {2: 2.0})
    make_run(tmp_path / "s/a-s0", [3.0, 2.0], {2: 2.125}, recipe="a")
    branches(tmp_path / "b", BRANCHES[lost], checkpoints)
    folders = [str(tmp_path / "s"), str(tmp_path / "b")]
    assert main(["compare", *folders, "--equivalent-within", "0.1", "--max-gap", "0.5"]) == 1
    document = json.loads((tmp_path / "s/compare/compare.json").read_text())
    (found,) = document["branches"]
    for row in found["rows"]:
        none = any(BRANCHES[lost](label, 1) is None for label in ("bf16", row["label"]))
        assert ("diverged" in row["verdict"]) == none == bool(row["lost"])
    assert document["pairs"][0]["mean"] == 0.125


RUNS: dict[str, dict[str, tuple[list[Loss], dict[int, Loss]]]] = {
    "a run in its first step": {"a": ([], {})},
    "its first loss": {"a": (["nan"], {})},
    "its validation": {"a": ([3.0, 2.0], {2: "inf"})},
    "the baseline": {"bf16": ([3.0, "nan"], {})},
    "all": {"bf16": (["inf"], {}), "a": (["nan"], {}), "b": ([], {})},
}


@pytest.mark.parametrize("lost", RUNS)
def test_runs_that_diverge(lost: str, make_run: Callable[..., Path], tmp_path: Path) -> None:
    whole: tuple[list[Loss], dict[int, Loss]] = ([3.0, 2.0], {2: 2.0})
    for label in LABELS:
        train, val = RUNS[lost].get(label, whole)
        status = "diverged" if label in RUNS[lost] else "finished"
        make_run(tmp_path / f"s/{label}-s0", train, val, recipe=label, status=status, max_steps=2)
    assert main(["compare", str(tmp_path / "s"), "--max-gap", "0.5"]) == 1
    rows = json.loads((tmp_path / "s/compare/compare.json").read_text())["runs"]
    assert {r["label"] for r in rows if r["status"] == "diverged"} == RUNS[lost].keys()
