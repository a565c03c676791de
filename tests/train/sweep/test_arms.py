"""Arms that come later join the branches that are there; casts of the same checkpoints."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from train.cli import main
from train.compare.branch_casts import FLOOR, CastSet, read_casts
from train.compare.branches import BranchSet, read_branches, reread
from train.runs.casts import CastGap
from train.runs.lock import held
from train.stats.serial import window_mean
from train.sweep.casts import cast_gaps


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, tiny: Path, tiny_data: Path, recipes: Path
) -> Path:
    folder = tmp_path_factory.mktemp("run") / "bf16-s0"
    layers = ("-c", str(tiny), "-c", str(recipes / "bf16.yaml"), "--data.path", str(tiny_data))
    assert main(["fit", *layers, "--run_dir", str(folder), "--checkpoint_every", "3"]) == 0
    return folder


def branch(run: Path, out: Path, arms: list[Path], *more: str) -> int:
    checkpoint = str(run / "checkpoints" / "step-00000003")
    fixed = ("--branch-from", checkpoint, "--horizon", "1", "--branches", "2")
    return main(["sweep", "--out", str(out), *fixed, "--recipes", *map(str, arms), *more])


def test_arms_that_come_later_are_those_of_one_call(
    run: Path, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit; the baseline and the arms that are done are not run again."""
    bf16, int8, fp8 = (recipes / f"{name}.yaml" for name in ("bf16", "mxint8", "mxfp8"))
    for arms in ([bf16, int8], [bf16, fp8]):
        assert branch(run, tmp_path / "twice", arms) == 0
    assert "2 of 2 branches of 1 checkpoints, 1 arms each" in capsys.readouterr().out
    assert branch(run, tmp_path / "once", [bf16, int8, fp8]) == 0
    twice, once = reread(tmp_path / "twice"), reread(tmp_path / "once")
    assert (twice.arms, len(twice.units)) == (once.arms, 2)
    assert twice.rows() == once.rows() and twice.pairs() == once.pairs()
    assert [u["window_losses"] for u in twice.units] == [u["window_losses"] for u in once.units]


def plain(**losses: float | None) -> dict[str, object]:
    windows = {"windows": {"ids": [0], "documents": [0]}, "validation_windows": 1}
    return {"checkpoint": 0, "branch": 0, "seed": 1, "seconds": 1.0, "losses": losses,
            "window_losses": {k: v and [v] for k, v in losses.items()}} | windows  # fmt: skip


ARMS = [{"label": name, "recipe": name, "changes": {}, "control": None} for name in "abc"]
POINTS = [{"path": "r/checkpoints/s", "step": 1, "max_steps": 9, "digest": "d"}]
EMPTY = BranchSet("a", 1, ARMS, POINTS, {}, [])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (plain(a=2.5, c=1.0), "a came out as 2.0 and as 2.5"),
        (plain(a=None, c=1.0), "a came out as 2.0 and as None"),
        (plain(b=3.5), "b came out as 3.0 and as 3.5"),
        (plain(c=1.0) | {"windows": {"ids": [1], "documents": [0]}}, "on other windows"),
    ],
)
def test_arms_that_are_no_pairs_do_not_join(more: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EMPTY.with_unit(plain(a=2.0, b=3.0)).with_unit(more)


def test_an_arm_that_a_branch_lacks_is_no_diverged_one() -> None:
    found = EMPTY.with_unit(plain(a=2.0, b=None))
    assert found.missing(0, 0, "abc") == ("c",) and found.missing(0, 1, "ab") == ("a", "b")
    b, c = found.rows()
    assert (b["verdict"], c["verdict"]) == ("1 of 1 diverged: no verdict", "no units: no verdict")


def test_two_calls_at_once_lose_nothing(tmp_path: Path) -> None:
    EMPTY.write(tmp_path)

    def add(name: str) -> None:
        for number in range(20):
            with held(tmp_path / "lock"):
                unit = plain(a=2.0, **{name: 1.0}) | {"branch": number}
                reread(tmp_path).with_unit(unit).write(tmp_path)

    threads = [threading.Thread(target=add, args=(name,)) for name in "bc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = read_branches(tmp_path)
    assert found is not None
    assert [sorted(unit["losses"]) for unit in found.units] == [["a", "b", "c"]] * 20


def test_casts_are_those_of_the_cast_gap(run: Path, recipes: Path, tmp_path: Path) -> None:
    """Of the last weights, which the sweep's own cast gap has too; a later call adds recipes."""
    bf16, int8, fp8 = (recipes / f"{name}.yaml" for name in ("bf16", "mxint8", "mxfp8"))
    perturbed = recipes.parent / "control" / "bf16_perturbed.yaml"
    for arms in ([bf16, int8, perturbed], [bf16, fp8]):
        assert branch(run, tmp_path / "out", arms, "--casts") == 0
    found = read_casts(tmp_path / "out")
    assert found is not None
    (unit,) = found.units
    assert {*unit["values"]} == {"bf16", "mxint8", "mxfp8", FLOOR}
    own = cast_gaps_at(run, recipes, tmp_path, step=3)
    assert [row["recipe"] for row in found.rows()] == ["mxint8", FLOOR, "mxfp8"]
    for row in found.rows():
        if row["recipe"] != FLOOR:
            assert row["kl"]["mean"] == pytest.approx(own[row["recipe"]]["kl"], rel=1e-5)
            assert row["gap"]["mean"] == pytest.approx(own[row["recipe"]]["mean"], rel=1e-5)


def cast_gaps_at(run: Path, recipes: Path, folder: Path, step: int) -> dict[str, dict[str, float]]:
    """By the other path: run folders of these recipes, all checkpoints of the baseline."""
    runs = [run]
    for name in ("mxint8", "mxfp8"):
        (folder / name).mkdir()
        config = (run / "config.yaml").read_text()
        policy = json.dumps({"name": name, "recipe": name})
        (folder / name / "config.yaml").write_text(with_policy(config, policy))
        record = json.loads((run / "run.json").read_text())
        del record["identity"]  # it is that of this record and config
        (folder / name / "run.json").write_text(json.dumps(record | {"recipe": name}))
        runs.append(folder / name)
    gaps: dict[str, CastGap] = cast_gaps(run, runs)
    return {
        name: point for name, gap in gaps.items() for point in gap.along if point["step"] == step
    }


def with_policy(config: str, policy: str) -> str:
    from train.config.layers import spelt_out
    from train.config.strict_yaml import load_yaml

    plain = load_yaml(config)
    plain["model"]["policy"] = spelt_out(json.loads(policy))
    return json.dumps(plain)


def test_a_casts_error_is_that_of_its_windows_means() -> None:
    """Three checkpoints see the same windows: what they share is not averaged away."""
    rng = np.random.default_rng(0)
    shared, own = rng.normal(size=60), rng.normal(size=(3, 60)) * 0.1
    windows = {"ids": [*range(60)], "documents": [0] * 60}
    found = CastSet("a")
    for i, values in enumerate(shared + own):
        column = {"gap": values.tolist(), "kl": values.tolist()}
        unit = {"checkpoint": i, "digest": str(i), "windows": windows, "values": {"x": column}}
        found = found.with_unit(unit)
    (row,) = found.rows()
    expected = window_mean(shared + own.mean(0), [0] * 60).estimate
    assert row["kl"]["standard_error"] == pytest.approx(expected.standard_error)
    assert row["kl"]["standard_error"] > 0.8 * shared.std(ddof=1) / 60**0.5
    with pytest.raises(ValueError, match="other windows"):
        found.with_unit(unit | {"windows": windows | {"ids": [*range(1, 61)]}})
