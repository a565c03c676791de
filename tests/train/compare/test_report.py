"""The files that `lowbit compare` writes say what compare.json says, and need nothing else."""

import csv
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from train.compare.branches import BranchSet
from train.compare.compare import compare
from train.compare.overlay import write_overlay
from train.compare.plot import _branch_names, _draw_branches
from train.compare.report import MAX_POINTS, _thinned, write_report
from train.output.figures import save
from train.runs.run import read_runs

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, make_run: Make) -> Path:
    tmp_path = tmp_path_factory.mktemp("sweep")
    for seed in range(3):
        make_run(
            tmp_path / f"bf16-s{seed}", [3.0, 2.0, 1.0], {1: 3.5, 3: 2.0 + seed / 9}, seed=seed
        )
        val = {1: 3.6, 3: 2.1 + seed / 8}
        make_run(tmp_path / f"x-s{seed}", [3.0, 2.5, 1.0], val, recipe="x", seed=seed)
    make_run(tmp_path / "bad-s0", [3.0, math.inf], {}, recipe="</script>", max_steps=3)
    runs = read_runs([tmp_path])
    write_report(compare(runs), runs, tmp_path / "compare")
    return tmp_path / "compare"


def document(report: Path) -> dict[str, Any]:
    return json.loads((report / "compare.json").read_text())


def test_page_holds_compare_json_itself(report: Path) -> None:
    page = (report / "report.html").read_text()
    (embedded,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', page, re.S
    )
    assert json.loads(embedded) == document(report)


def test_page_fetches_nothing(report: Path) -> None:
    page = (report / "report.html").read_text()
    assert not re.search(r"https?://|\bsrc=|\bhref=|@import|url\((?!#)|fetch\(", page)


def test_table_rows_are_the_same_numbers(report: Path) -> None:
    with (report / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = document(report)
    for key in ("val_loss", "gap", "max_gap", "train_loss", "perplexity"):
        assert [row[key] for row in rows] == [
            "" if row[key] is None else repr(row[key]) for row in found["runs"]
        ]
    (pair,) = (p for p in found["pairs"] if (p["a"], p["b"]) == ("bf16", "x"))
    assert {row["recipe_gap_mean"] for row in rows if row["label"] == "x"} == {str(pair["mean"])}


def test_interval_curve_ends_where_the_pair_does(report: Path) -> None:
    found = document(report)
    (band,) = found["bands"]
    (pair,) = (p for p in found["pairs"] if (p["a"], p["b"]) == ("bf16", "x"))
    assert (band["label"], band["tokens"]) == ("x", [32, 96])
    assert [band[k][-1] for k in ("mean", "low", "high")] == [
        pytest.approx(pair[k], rel=1e-5) for k in ("mean", "low", "high")
    ]


def test_only_settings_that_differ_are_listed(report: Path) -> None:
    settings = document(report)["settings"]
    assert settings["config.yaml.recipe"] == ["bf16"] * 3 + ["</script>"] + ["x"] * 3
    assert "config.yaml.optimizer.lr" not in settings and "versions.torch" not in settings


def test_pictures_are_the_same_for_the_same_runs(report: Path) -> None:
    assert (report / "compare.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    svg = (report / "compare.svg").read_bytes()
    runs = read_runs([report.parent])
    write_report(compare(runs), runs, report)
    assert (report / "compare.svg").read_bytes() == svg


def test_thinning_keeps_ends_and_spikes() -> None:
    values = np.sin(np.arange(100_000.0))
    values[54_321], values[77_777] = 99.0, -99.0
    kept = _thinned(values)
    assert len(kept) <= MAX_POINTS and {0, 54_321, 77_777, 99_999} <= {*kept.tolist()}
    assert _thinned(values[:MAX_POINTS]).tolist() == list(range(MAX_POINTS))


def test_tensorboard_shows_the_same_curves(report: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = document(report)
    write_overlay(found, tmp_path)
    write_overlay(found, tmp_path)  # the second replaces the first
    (x,) = (i for i, name in enumerate(found["run_ids"]) if name == "x s1")
    events = EventAccumulator(str(tmp_path / "tensorboard" / "x-s1")).Reload()
    for tag, curve in (("val/loss", "val"), ("val/gap", "val_gap"), ("train/loss", "train")):
        expected = found["curves"][x][curve]
        assert [event.step for event in events.Scalars(tag)] == expected["tokens"]
        assert [event.value for event in events.Scalars(tag)] == [
            np.float32(value) for value in expected["values"]
        ]
    assert events.Scalars("final/gap")[0].value == np.float32(found["runs"][x]["gap"])
    mean = EventAccumulator(str(tmp_path / "tensorboard" / "mean-x")).Reload()
    assert {*mean.Tags()["scalars"]} == {"gap/mean", "gap/low", "gap/high"}
    assert (
        "custom_scalars__config__"
        in EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["tensors"]
    )


@pytest.mark.parametrize(
    ("horizons", "names"),
    [
        ((5, 5), ["x, H = 5\na", "x, H = 5\nb"]),
        ((5, 9), ["x, H = 5", "x, H = 9"]),
        ((5, 9, 5), ["x, H = 5\na", "x, H = 9", "x, H = 5\nc"]),
    ],
)
def test_sets_of_branches_have_names_of_their_own(
    horizons: tuple[int, ...], names: list[str]
) -> None:
    row = {"label": "x", "low": 0.0, "diverged": 0}
    sets = [({"path": f"runs/{n}", "horizon": h}, row) for n, h in zip("abc", horizons)]  # noqa: B905
    assert _branch_names(sets) == names


@pytest.mark.parametrize(
    ("gaps", "name"),
    [([0.1], "x, H = 5, no interval"), ([0.1] * 3, "x, H = 5, no interval"),
     ([0.1, 0.2, None], "x, H = 5, 1 diverged, no interval"), ([0.1, 0.2, 0.3], "x, H = 5")],
)  # fmt: skip
def test_an_arm_without_an_interval_is_drawn_without_one(
    gaps: list[float | None], name: str
) -> None:
    """Not with caps of width zero: one branch, no spread, too few that did not diverge."""
    arms = [{"label": x, "recipe": x, "changes": {}, "control": None} for x in ("bf16", "x")]
    point = {"path": "r/checkpoints/s", "step": 1, "max_steps": 9, "digest": "d"}
    units = [
        {"checkpoint": 0, "branch": b, "seed": b, "validation_windows": 1, "seconds": 1.0,
         "losses": {"bf16": 2.0, "x": None if gap is None else 2 + gap}}
        for b, gap in enumerate(gaps)
    ]  # fmt: skip
    found = BranchSet("bf16", 5, arms, [point], {}, [], units).document(Path("b"))
    axes = Figure().subplots()
    _draw_branches(axes, [(found, row) for row in found["rows"]], "bf16", {})
    assert [text.get_text() for text in axes.get_yticklabels()] == [name]
    assert len(axes.containers) == ("no interval" not in name)  # of error bars


def test_a_logarithmic_axis_has_numbers_and_no_markup(tmp_path: Path) -> None:
    """Names of folders may hold a $, so that nothing is read as mathematics."""
    figure = Figure()
    axes = figure.subplots()
    axes.loglog([1, 10, 1000], [1e-6, 1e-3, 1.0])
    save(figure, tmp_path / "log")
    texts = re.findall(r"<!-- (.*?) -->", (tmp_path / "log.svg").read_text())
    assert {"1", "10", "100", "1000", "0.001", "1e\N{MINUS SIGN}06"} <= {*texts}
    assert not any("$" in text for text in texts)
