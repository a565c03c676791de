"""A sweep: paired runs in processes of their own, what is done is skipped, and the cast gap."""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from train.cli import main
from train.compare import compare
from train.compare.pairing import check_pairing
from train.runs.casts import read_cast_gaps
from train.runs.lock import RunLock, holder
from train.runs.record import run_status
from train.runs.run import read_runs
from train.sweep import sweep
from train.sweep.request import PlannedRun, SweepRequest, read_request
from train.sweep.sweep import _mispaired, add_arguments

Fit = Callable[..., int]
Make = Callable[..., Path]


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


@pytest.mark.slow
def test_sweep_and_compare(
    tmp_path: Path, recipes: Path, tiny_data: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """End to end through the command line; a second call, in this process, trains nothing."""
    sweep = [
        *("sweep", "--out", "out", "-c", str(tiny), "--recipes"),
        *(str(recipes / f"{name}.yaml") for name in ("bf16", "mxint8")),
        *("--", "--data.path", str(tiny_data)),
    ]
    command = [sys.executable, "-P", "-m", "train.cli", *sweep]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert {run_status(tmp_path / "out" / f"{n}-s0") for n in ("bf16", "mxint8")} == {"finished"}
    assert set(read_cast_gaps(tmp_path / "out" / "bf16-s0")) == {"bf16", "mxint8"}
    monkeypatch.chdir(tmp_path)
    assert main(sweep) == 0
    assert capsys.readouterr().out.count("is finished") == 2
    assert main(["compare", "out"]) == 0
    assert "one seed: no verdict" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "compare" / "compare.json").read_text())


SPEC = """
recipes: [{recipes}/bf16.yaml, {recipes}/mxint8.yaml]
seeds: [0, 1]
overrides: {{slow: {{model.optimization.lr: 1.0e-3}}, b16: {{model.policy.keep_first: 1}}}}
settings: {{trainer.max_steps: 4}}
"""


def test_one_yaml_expands_to_the_plan(recipes: Path, tiny: Path, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(SPEC.format(recipes=recipes) + f"config: [{tiny}]\n")
    arguments = ["--spec", str(spec), "--out", "out", "--seeds", "0", "7", "--", "--a", "1"]
    plan = read_request(parsed(arguments)).runs()
    assert [p.folder.name for p in plan] == [
        f"{recipe}-{override}-s{seed}"
        for seed in (0, 7)
        for override in ("slow", "b16")
        for recipe in ("bf16", "mxint8")
    ]
    tail = ("--model.optimization.lr", "0.001", "--trainer.max_steps", "4", "--a", "1")
    assert plan[4].command((tiny,))[-len(tail) :] == [*tail]


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("reciepes: []", "holds .'reciepes'., expected some of out, config, recipes"),
        ("seeds: [a]", "seeds are .'a'., expected whole numbers"),
        ("seeds: 3", "seeds is 3, expected a list"),
        ("overrides: {x: 1}", "overrides.x is 1, expected"),
        ("overrides: {'../x': {}}", "the name 'bf16-../x' becomes a folder"),
        ("recipes: [nowhere.yaml]", "no such file: nowhere.yaml"),
        ("seeds: [1, 1]", "seeds must differ"),
    ],
)
def test_a_wrong_yaml_is_refused(
    line: str, message: str, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "spec.yaml"
    key = line.partition(":")[0]
    rest = {"recipes": f"[{recipes}/bf16.yaml]", "out": str(tmp_path / "out")}
    lines = [f"{k}: {v}" for k, v in rest.items() if k != key]
    spec.write_text("\n".join([*lines, line]))
    assert main(["sweep", "--spec", str(spec)]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_status_says_where_every_run_stands(
    tmp_path: Path, make_run: Make, recipes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """32 tokens a step at 1002 tokens/s (the median): 100 steps take 3.2 s, 98 of them 3.1 s."""
    losses = [3.0, 2.0, 1.0]
    make_run(tmp_path / "bf16-s0", losses, {3: 2.5}, max_steps=100, status="finished")
    make_run(tmp_path / "mxint8-s0", losses, {}, recipe="mxint8", max_steps=100, status="running")
    files = [str(recipes / f"{name}.yaml") for name in ("bf16", "mxint8")]
    arguments = ["--out", str(tmp_path), "--recipes", *files, "--seeds", "0", "1", "--status"]
    assert main(["sweep", *arguments, "--jobs", "2"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1] == ["bf16-s0", "0", "finished", "3", "100", "2.5000", "0.03", "-"]
    assert rows[2] == ["mxint8-s0", "1", "stopped", "3", "100", "-", "0.03", "0:00:03"]
    assert rows[4] == ["mxint8-s1", "3", "waiting", "0", "100", "-", "0.03", "0:00:03"]
    assert rows[-1] == "1 of 4 runs ended; left: 0:00:05 with --jobs 2".split()
    lock = RunLock(tmp_path / "mxint8-s0")
    lock.acquire()
    child = "from train.runs.lock import holder; from pathlib import Path; print(holder(Path('.')))"
    found = subprocess.check_output(
        [sys.executable, "-c", child], cwd=tmp_path / "mxint8-s0", text=True
    )
    assert found.strip() == f"{socket.gethostname()}, process {os.getpid()}"
    lock.release()


class _Launcher:
    """Leaves finished runs whose gap to bf16 varies a little from seed to seed."""

    make: Make
    stopped = 0

    def __init__(self, configs: tuple[Path, ...], jobs: int) -> None: ...

    def run(self, runs: list[PlannedRun]) -> dict[Path, str]:
        for planned in runs:
            name, seed = planned.variant.recipe_name, planned.seed
            loss = 2.0 + seed + (0.01 + 0.001 * (seed % 2) if name == "mxint8" else 0.0)
            settings = {"recipe": name, "seed": seed, "initial_weights": str(seed)}
            type(self).make(planned.folder, [3.0, 2.0], {2: loss}, **settings)
        return {}


def test_seeds_end_when_their_mean_is_known_well_enough(
    tmp_path: Path,
    make_run: Make,
    recipes: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Gaps of 0.010, 0.011, 0.010, 0.011: their variance over 0.00025² is 5.3, so six seeds."""
    monkeypatch.setattr(_Launcher, "make", staticmethod(make_run), raising=False)
    monkeypatch.setattr(sweep, "Launcher", _Launcher)
    monkeypatch.setattr(sweep, "_evaluate_casts", lambda *_: None)
    files = [str(recipes / f"{name}.yaml") for name in ("bf16", "mxint8")]
    arguments = ["--out", str(tmp_path), "--recipes", *files, "--seeds", *map(str, range(9))]
    for _ in range(2):  # a second call finds all done
        assert main(["sweep", *arguments, "--target-se", "0.00025"]) == 0
        assert "mxint8: +0.01050 ± 0.00029 from 4 seeds; 0.00025 takes 6" in capsys.readouterr().out
        assert len([*tmp_path.glob("*-s*")]) == 12
    (pair,) = compare.compare(read_runs([tmp_path]))["pairs"]
    assert pair["first_stage"] == [0, 1, 2, 3] and len(pair["seeds"]) == 6
    assert pair["freedom"] == pytest.approx(3)
    assert pair["standard_error"] == pytest.approx((1e-6 / 3 / 6) ** 0.5)


def test_a_task_becomes_its_run(
    tmp_path: Path, recipes: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    became: list[str] = []
    monkeypatch.setattr(os, "execv", lambda _, command: became.extend(command))
    files = [str(recipes / f"{name}.yaml") for name in ("bf16", "mxint8")]
    arguments = ["--out", str(tmp_path), "-c", str(tiny), "--recipes", *files, "--seeds", "0", "4"]
    assert main(["sweep", *arguments, "--task", "4"]) == 2
    assert not became
    main(["sweep", *arguments, "--task", "3"])
    assert became[-4:] == ["--run_dir", str(tmp_path / "mxint8-s4"), "--seed_everything", "4"]


def test_other_initial_weights_are_named(tmp_path: Path, make_run: Make, recipes: Path) -> None:
    make_run(tmp_path / "bf16-s0", [3.0], {})
    make_run(tmp_path / "mxint8-s0", [3.0], {}, recipe="mxint8", initial_weights="others")
    files = (recipes / "bf16.yaml", recipes / "mxint8.yaml")
    plan = SweepRequest(tmp_path, (), files, (0,), {}, ()).runs()
    found = _mispaired(plan)
    assert found == {
        tmp_path / "mxint8-s0": f"its initial weights are not those of {tmp_path / 'bf16-s0'}"
    }


@pytest.mark.slow
def test_a_sweep_killed_twice_gives_the_table_of_one_that_was_not(
    tmp_path: Path, recipes: Path, tiny_data: Path, tiny: Path, fit: Fit
) -> None:
    """The unkilled one runs in this process; kills hit the sweep, and must reach its runs."""
    names, seeds = ("bf16", "mxint8"), ("0", "1")
    recipe_files = [str(recipes / f"{name}.yaml") for name in names]
    settings = ["--trainer.max_steps", "6", "--checkpoint_every", "2"]
    settings += ["--data.path", str(tiny_data)]
    command = [
        *(sys.executable, "-P", "-m", "train.cli", "sweep", "--out", "killed", "-c", str(tiny)),
        *("--recipes", *recipe_files, "--seeds", *seeds, "--jobs", "2", "--", *settings),
    ]
    environment, saved = os.environ | {"OMP_NUM_THREADS": "1"}, "killed/*/checkpoints/step-*"
    for signum, runs_begun in ((signal.SIGKILL, 1), (signal.SIGTERM, 3)):
        sweep = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
        while len({path.parent for path in tmp_path.glob(saved)}) < runs_begun:
            assert sweep.poll() is None
            time.sleep(0.02)
        sweep.send_signal(signum)
        assert sweep.wait() == (-9 if signum == signal.SIGKILL else 143)
        runs = [folder for folder in (tmp_path / "killed").iterdir() if (folder / "lock").exists()]
        assert signum == signal.SIGKILL or not any(map(holder, runs))  # SIGTERM waits for them
        while any(map(holder, runs)):
            time.sleep(0.02)
    assert subprocess.run(command, cwd=tmp_path, env=environment).returncode == 0
    for name, seed in product(names, seeds):
        folder = tmp_path / "whole" / f"{name}-s{seed}"
        assert fit(folder, name, *settings, "--seed_everything", seed) == 0
    tables = []
    for out in ("killed", "whole"):
        runs = read_runs([tmp_path / out])
        result = compare.compare(runs, check_pairing(runs))
        for row in result["runs"]:
            del row["path"], row["tokens_per_second"], row["cast_gap"]
        tables.append((result["runs"], result["recipes"], result["pairs"]))
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_a_failed_run_does_not_stop_the_others(
    tmp_path: Path, recipes: Path, tiny_data: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    bad = tmp_path / "bad.yaml"
    bad.write_text("model: {policy: {name: bad, recipe: {}, skip: [nothing]}}\n")
    command = [
        *("sweep", "--out", "out", "-c", str(tiny)),
        *("--recipes", str(bad), str(recipes / "bf16.yaml")),
        *("--", "--data.path", str(tiny_data), "--trainer.max_steps", "1"),
    ]
    monkeypatch.chdir(tmp_path)
    assert main(command) == 1
    assert "failed: out/bad-s0" in capsys.readouterr().err
    assert run_status(tmp_path / "out" / "bf16-s0") == "finished"
