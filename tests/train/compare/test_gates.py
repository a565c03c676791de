"""Bounds for CI: what passes --max-gap and --assert-equal, and what must not."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from train.compare.branches import BranchSet

Make = Callable[..., Path]
Verb = Callable[..., int]
pytestmark = pytest.mark.usefixtures("no_pictures")
Capture = pytest.CaptureFixture[str]
TRAIN, VAL = [3.0, 2.0, 1.0], {1: 3.5, 3: 2.0}


@pytest.mark.parametrize(("bound", "code"), [("0.51", 1), ("0.52", 1), ("0.53", 0)])
def test_exit_code_over_max_gap(
    tmp_path: Path, make_run: Make, bound: str, code: int, lowbit_compare: Verb
) -> None:
    """Gaps 0.49 to 0.51: their mean is 0.5, the upper end of the 95 % interval 0.5248."""
    sweep(make_run, tmp_path, [0.49, 0.5, 0.51])
    assert lowbit_compare(tmp_path, "--max-gap", bound) == code


def sweep(make_run: Make, out: Path, gaps: list[float], recipe: str = "x", **info: Any) -> None:
    for seed, gap in enumerate(gaps):
        if not (out / f"bf16-s{seed}").exists():
            make_run(out / f"bf16-s{seed}", TRAIN, {3: 2.0}, seed=seed)
        make_run(out / f"{recipe}-s{seed}", TRAIN, {3: 2.0 + gap}, recipe=recipe, seed=seed, **info)


NOT_PASSED: dict[str, Callable[[Make, Path], object]] = {
    "one seed": lambda make, out: sweep(make, out, [0.0]),
    "two seeds": lambda make, out: sweep(make, out, [0.0, 0.001]),
    "an interval of -1.4 to 1.4": lambda make, out: sweep(make, out, [0.0, 0.6, -0.5]),
    "a NaN validation": lambda make, out: sweep(make, out, [0.0, 0.001, math.nan]),
    "an infinite validation": lambda make, out: sweep(make, out, [0.0, 0.001, math.inf]),
    "a failed seed": lambda make, out: sweep(make, out, [0.0, 0.001, 0.002, 0.0], status="failed"),
    "a baseline that failed": lambda make, out: (
        sweep(make, out, [0.0, 0.001, 0.002]),
        make(out / "bf16-s3", TRAIN, {3: 2.0}, seed=3, status="failed"),
    ),
    "a seed that still runs": lambda make, out: (
        sweep(make, out, [0.0, 0.001, 0.002]),
        make(out / "x-s3", TRAIN, {3: 2.0}, recipe="x", seed=3, status="running"),
        make(out / "bf16-s3", TRAIN, {3: 2.0}, seed=3),
    ),
    "a seed without a baseline": lambda make, out: (
        sweep(make, out, [0.0, 0.001, 0.002]),
        make(out / "x-s3", TRAIN, {3: 2.9}, recipe="x", seed=3),
    ),
    "three times the same gap": lambda make, out: sweep(make, out, [0.25, 0.25, 0.25]),
}


@pytest.mark.parametrize("case", NOT_PASSED)
def test_what_does_not_pass_max_gap(
    tmp_path: Path, make_run: Make, case: str, capsys: Capture, lowbit_compare: Verb
) -> None:
    NOT_PASSED[case](make_run, tmp_path)
    assert lowbit_compare(tmp_path, "--max-gap", "0.5") == 1
    assert "FAILED --max-gap 0.5: " in capsys.readouterr().out


def test_max_gap_bounds_no_control_and_passes_equal_numbers(
    tmp_path: Path, make_run: Make, capsys: Capture, lowbit_compare: Verb
) -> None:
    sweep(make_run, tmp_path, [0.0, 0.001, 0.002])
    sweep(make_run, tmp_path, [9.0, 9.1, 9.2], recipe="noise", control="noise")
    sweep(make_run, tmp_path, [0.0, 0.0, 0.0], recipe="same")
    assert lowbit_compare(tmp_path, "--max-gap", "0.5") == 0
    sweep(make_run, tmp_path, [-0.5, -0.4, 0.6], recipe="wide")  # below on average
    assert lowbit_compare(tmp_path, "--max-gap", "0.5") == 1
    assert "wide may cost +1.41104: gap -0.10000 (" in capsys.readouterr().out


BRANCHES: dict[str, tuple[list[list[float | None]], str | None]] = {
    "within": ([[0.1, 0.2, 0.15], [0.1, 0.2, 0.15]], None),
    "the same numbers": ([[0.0, 0.0, 0.0]], None),
    "a wide interval": ([[0.0, 0.5, -0.6], [0.0, 0.1, 0.2]], r"may cost \+0\.\d+: gap \+0\.0"),
    "better on average, and wide": ([[-0.9, -0.1, 0.8]], r"may cost \+2\.\d+: gap -0\.0"),
    "one branch": ([[0.1]], "which takes 3 units: 1 unit: no verdict"),
    "two of one checkpoint": ([[0.1, 0.2, 0.15], [0.1, 0.12]], "2 branches of a checkpoint"),
    "one that diverged": ([[0.1, 0.2, 0.15, None]], "1 of 4 diverged"),
    "all diverged": ([[None, None, None]], "3 of 3 diverged"),
    "one gap three times": ([[0.25, 0.25, 0.25]], "no spread"),
}


@pytest.mark.parametrize("case", BRANCHES)
def test_max_gap_holds_branches_to_the_bound(
    tmp_path: Path, make_run: Make, case: str, capsys: Capture, lowbit_compare: Verb
) -> None:
    """A control among them costs what it likes."""
    gaps, message = BRANCHES[case]
    sweep(make_run, tmp_path, [0.0, 0.001, 0.002])
    arms = [{"label": x, "recipe": x, "changes": {}, "control": "noise" if x == "n" else None}
            for x in ("bf16", "x", "n")]  # fmt: skip
    points = [
        {"path": f"bf16-s{c}/checkpoints/s", "step": 1, "max_steps": 9, "digest": str(c)}
        for c in range(len(gaps))
    ]
    units = [
        {"checkpoint": c, "branch": b, "seed": b, "validation_windows": 1, "seconds": 1.0,
         "losses": {"bf16": 2.0, "x": None if gap is None else 2 + gap, "n": 9.0 + b}}
        for c, own in enumerate(gaps) for b, gap in enumerate(own)
    ]  # fmt: skip
    BranchSet("bf16", 5, arms, points, {}, [], units).write(tmp_path / "branches")
    assert lowbit_compare(tmp_path, "--max-gap", "0.5") == (message is not None)
    failed = [x for x in capsys.readouterr().out.splitlines() if x.startswith("FAILED")]
    assert len(failed) == (message is not None)
    assert not failed or re.search(f"x, branches of 5 steps in .*{message}", failed[0])


@pytest.mark.parametrize("seeds", [(3, 4, 5), (1, 2, 3), (0, 1, 2)])
def test_golden_curves_are_no_units_of_these_runs(
    tmp_path: Path, make_run: Make, capsys: Capture, lowbit_compare: Verb, seeds: tuple[int, ...]
) -> None:
    """Gaps 0.001 there and 0.9 here, of other, some or all of the seeds: averaged they passed."""
    sweep(make_run, tmp_path / "old", [0.001, 0.002, 0.003])
    for seed in seeds:
        make_run(tmp_path / "new" / f"bf16-s{seed}", TRAIN, {3: 2.0}, seed=seed)
        make_run(tmp_path / "new" / f"x-s{seed}", TRAIN, {3: 2.9}, recipe="x", seed=seed)
    assert lowbit_compare(tmp_path / "old", "--export", tmp_path / "golden.json") == 0
    found = lowbit_compare(
        tmp_path / "new", "--import", tmp_path / "golden.json", "--max-gap", "0.5"
    )
    out = capsys.readouterr().out
    assert found == 1 and "6 paired seeds" not in out and "golden.json/bf16" in out


UNEQUAL: dict[str, Callable[[str], str]] = {
    "a sign of zero": lambda text: text.replace(",0.0,", ",-0.0,", 1),
    "NaN for an empty cell": lambda text: text.replace(",,", ",nan,nan", 1),
    "quant/clamped": lambda text: text.replace(",7,", ",8,", 1),
    "a step less": lambda text: text.rstrip("\n").rpartition("\n")[0] + "\n",
    "perplexity": lambda text: text.replace("2.0,7,", "2.5,7,", 1),
}


@pytest.mark.parametrize("case", UNEQUAL)
@pytest.mark.parametrize("golden", [True, False])
def test_what_is_not_equal(
    tmp_path: Path, make_run: Make, case: str, golden: bool, lowbit_compare: Verb
) -> None:
    for out in ("old", "new"):
        metrics = make_run(tmp_path / out / "bf16-s0", [3.0, 0.0, 1.0], VAL) / "metrics.csv"
        header, *rows = metrics.read_text().splitlines()
        text = "\n".join([header + ",quant/clamped", *(f"{row},7" for row in rows)]) + "\n"
        text = text.replace(",quant/clamped\n", ",quant/clamped\n", 1).replace(",7\n", ",7,\n")
        metrics.write_text(text.replace("quant/clamped\n", "quant/clamped,end\n", 1))
    assert lowbit_compare(tmp_path / "old", "--export", tmp_path / "g.json") == 0

    def constant(_: str) -> None:
        raise AssertionError("not JSON")

    json.loads((tmp_path / "g.json").read_text(), parse_constant=constant)
    there = ["--import", tmp_path / "g.json"] if golden else [tmp_path / "old" / "bf16-s0"]
    arguments = [*there, tmp_path / "new" / "bf16-s0", "--assert-equal", "--allow", "tokens"]
    order = arguments if not golden else [arguments[2], *arguments[:2], *arguments[3:]]
    assert lowbit_compare(*order) == 0
    path = tmp_path / "new" / "bf16-s0" / "metrics.csv"
    changed = UNEQUAL[case](path.read_text())
    assert changed != path.read_text()
    path.write_text(changed)
    assert lowbit_compare(*order) == 1


@pytest.mark.parametrize(
    ("one", "other"), [("failed", "finished"), ("finished", "failed"), ("failed", "failed"),
                       ("running", "finished")],
)  # fmt: skip
def test_equal_curves_of_runs_that_ended_otherwise(
    tmp_path: Path, make_run: Make, one: str, other: str, lowbit_compare: Verb
) -> None:
    folders = [
        make_run(tmp_path / out / "bf16-s0", TRAIN, VAL, status=status)
        for out, status in (("old", one), ("new", other))
    ]
    assert lowbit_compare(*folders, "--assert-equal") == 1


def test_assert_equal_wants_a_partner_for_every_run(
    tmp_path: Path, make_run: Make, lowbit_compare: Verb
) -> None:
    for name in ("bf16", "x"):
        make_run(tmp_path / "old" / f"{name}-s0", TRAIN, VAL, recipe=name)
        make_run(tmp_path / "new" / f"{name}-s0", TRAIN, VAL, recipe=name)
    make_run(tmp_path / "new" / "y-s0", TRAIN, VAL, recipe="y")
    make_run(tmp_path / "other" / "x-s0", TRAIN, VAL, recipe="x")
    golden = tmp_path / "g.json"
    lowbit_compare(tmp_path / "old", "--export", golden)
    bound = ("--import", golden, "--assert-equal")
    with pytest.raises(ValueError, match="y-s0 has no golden run"):
        lowbit_compare(tmp_path / "new", *bound)
    with pytest.raises(ValueError, match="no run x-s0 beside"):
        lowbit_compare(tmp_path / "new" / "bf16-s0", *bound)
    with pytest.raises(ValueError, match="have one name"):
        lowbit_compare(tmp_path / "old", tmp_path / "other" / "x-s0", *bound)


@pytest.mark.parametrize("steps", [3, 2])
def test_a_copied_run_is_no_second_seed(
    tmp_path: Path, make_run: Make, steps: int, lowbit_compare: Verb
) -> None:
    """Whole, or as far as it had come when it was copied."""
    make_run(tmp_path / "bf16-s0", TRAIN, VAL)
    for seed in (0, 1):
        x = make_run(tmp_path / f"x-s{seed}", TRAIN, VAL, recipe="x", seed=seed)
    rows = (tmp_path / "x-s0" / "metrics.csv").read_text().splitlines()[: steps + 1]
    (x / "metrics.csv").write_text("\n".join(rows) + "\n")
    with pytest.raises(ValueError, match="one run under two seeds"):
        lowbit_compare(tmp_path, "--allow", "tokens")


def test_a_bound_that_binds_nothing_is_refused(
    tmp_path: Path, make_run: Make, lowbit_compare: Verb
) -> None:
    base = make_run(tmp_path / "bf16-s0", TRAIN, VAL)
    with pytest.raises(ValueError, match="needs a recipe beside the baseline bf16"):
        lowbit_compare(base, "--max-gap", "1")
    make_run(tmp_path / "x-s0", TRAIN, {}, recipe="x")
    assert lowbit_compare(tmp_path, "--max-gap", "1") == 1  # and no gap passes none
    with pytest.raises(ValueError, match="nan bounds nothing"):
        lowbit_compare(tmp_path, "--max-gap", "nan")


def test_assert_equal_names_the_first_difference(
    tmp_path: Path, make_run: Make, capsys: Capture, lowbit_compare: Verb
) -> None:
    folders = [make_run(tmp_path / name / "bf16-s0", TRAIN, VAL) for name in ("old", "new")]
    assert lowbit_compare(*folders, "--assert-equal") == 0
    other = make_run(tmp_path / "bad" / "bf16-s0", [3.0, math.nextafter(2.0, 3), 1.0], VAL)
    assert lowbit_compare(folders[0], other, "--assert-equal") == 1
    assert "train/loss at step 2 is 2.0000000000000004, not 2.0" in capsys.readouterr().out


def test_golden_curves_hold_a_run_to_the_bit(
    tmp_path: Path, make_run: Make, capsys: Capture, lowbit_compare: Verb
) -> None:
    golden = tmp_path / "ci" / "golden.json"
    for out, nudged in (("old", 2.0), ("same", 2.0), ("other", math.nextafter(2.0, 3))):
        make_run(tmp_path / out / "bf16-s0", [0.1 + 0.2, 2.0, 1.0], VAL)
        make_run(tmp_path / out / "x-s0", [0.1, nudged, math.nan], VAL, recipe="x")
    assert lowbit_compare(tmp_path / "old", "--export", golden) == 0
    bound = ("--import", golden, "--assert-equal")
    assert lowbit_compare(tmp_path / "same", *bound) == 0
    assert lowbit_compare(tmp_path / "other", *bound) == 1
    out = capsys.readouterr().out
    assert "golden.json/x-s0: train/loss at step 2 is 2.0000000000000004, not 2.0" in out
    with pytest.raises(ValueError, match="no run x-s0 beside"):
        lowbit_compare(tmp_path / "same" / "bf16-s0", *bound)
    golden.write_text("{}")
    with pytest.raises(ValueError, match=r"golden\.json lacks format_version"):
        lowbit_compare(tmp_path / "same", *bound)
