"""Branches: a continuation is the run's own, arms are paired, and what is done is kept."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.plain import SEAL, sealed
from train.checkpoints.folder import load_state
from train.cli import main
from train.compare.branches import read_branches
from train.config.strict_yaml import load_yaml
from train.runs.run import read_run
from train.stats.strata import estimate
from train.sweep.continuation import Continuation, build_module
from train.sweep.request import Variant
from train.sweep.units import Arms, BranchPoint


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, tiny: Path, tiny_data: Path, recipes: Path
) -> Path:
    """6 steps of bf16 in two micro-batches each, with a checkpoint at step 3."""
    torch.set_num_threads(1)  # as the tests themselves
    folder = tmp_path_factory.mktemp("run") / "bf16-s0"
    layers = ("-c", str(tiny), "-c", str(recipes / "bf16.yaml"), "--data.path", str(tiny_data))
    settings = ("--model.llama.attention_dropout", "0", "--checkpoint_every", "3")
    accumulate = ("--trainer.accumulate_grad_batches", "2")
    assert main(["fit", *layers, "--run_dir", str(folder), *settings, *accumulate]) == 0
    return folder


def branch(
    run: Path, out: Path, *recipes: Path, branches: int = 2, more: tuple[str, ...] = ()
) -> int:
    checkpoint = run / "checkpoints" / "step-00000003"
    return main([
        *("sweep", "--out", str(out), "--branch-from", str(checkpoint), "--horizon", "2"),
        *("--branches", str(branches), "--recipes", *map(str, recipes), *more),
    ])  # fmt: skip


def test_on_the_runs_own_batches_a_branch_is_the_run(run: Path, recipes: Path) -> None:
    """Bit for bit: optimizer state, learning rate, clipping, accumulation, validation."""
    config = load_yaml((run / "config.yaml").read_text())
    variant = Variant("bf16", "", recipes / "bf16.yaml", {})
    module, judge = build_module(config, variant), build_module(config, variant)
    own = Continuation(run / "checkpoints" / "step-00000003", config, seed=0, horizon=3)
    last = read_run(run)
    found = own.run(module, judge)
    assert found is not None and found.loss == last.val_curve[1][-1]
    assert np.mean(found.windows) == pytest.approx(found.loss, rel=1e-6)
    assert len(found.windows) == 4 == len({*own.windows["ids"]}) and own.windows["ids"][-1] > 100
    assert module.grad_norm == last.metrics["grad_norm"][-1]
    other = Continuation(run / "checkpoints" / "step-00000003", config, seed=1, horizon=3)
    assert other.run(module, judge) != found
    assert own.run(module, judge) == found  # nothing is left of the one before


def test_arms_without_a_difference_have_no_gap(run: Path, recipes: Path, tmp_path: Path) -> None:
    same = tmp_path / "same.yaml"
    same.write_text("model: {policy: {name: same, recipe: {}}}\n")
    perturbed = recipes.parent / "control" / "bf16_perturbed.yaml"
    arms = [recipes / "bf16.yaml", same, recipes / "mxfp8.yaml", perturbed]
    assert branch(run, tmp_path / "out", *arms) == 0
    found = read_branches(tmp_path / "out")
    assert found is not None
    gaps = found.gaps()
    assert gaps["same"] == [[0.0, 0.0]]
    assert len({*gaps["mxfp8"][0], *gaps["bf16_perturbed"][0], 0.0}) == 5
    # Which of them is larger after two steps is this machine's chaos, not a fact.
    assert max(map(abs, gaps["mxfp8"][0] + gaps["bf16_perturbed"][0])) < 0.1
    first = (tmp_path / "out" / "branches.json").read_bytes()
    assert branch(run, tmp_path / "out", *arms) == 0  # all is done
    assert (tmp_path / "out" / "branches.json").read_bytes() == first


@pytest.mark.slow
def test_a_rerun_goes_on_to_the_same_branches(run: Path, recipes: Path, tmp_path: Path) -> None:
    arms = (recipes / "bf16.yaml", recipes / "mxint8.yaml")
    for out, counts in (("twice", (1, 3)), ("once", (3,))):
        for jobs, count in enumerate(counts, 1):  # the rest in two processes
            more = ("--jobs", str(jobs))
            assert branch(run, tmp_path / out, *arms, branches=count, more=more) == 0
    twice, once = (read_branches(tmp_path / out) for out in ("twice", "once"))
    assert twice is not None and once is not None and len(once.units) == 3
    assert twice.gaps() == once.gaps()


def refused(capsys: Any, message: str, code: int) -> None:
    assert code == 2
    assert message in capsys.readouterr().err


def test_what_branches_cannot_do_is_refused(
    run: Path, recipes: Path, tmp_path: Path, capsys: Any
) -> None:
    bf16, out = recipes / "bf16.yaml", tmp_path / "out"
    branch(run, out, bf16)
    refused(capsys, "holds other branches: baseline was", branch(run, out, recipes / "mxfp8.yaml"))
    refused(capsys, "no -c", branch(run, tmp_path / "x", bf16, more=("-c", str(bf16))))
    refused(capsys, "not for --branch-from", branch(run, out, bf16, more=("--status",)))
    refused(capsys, "--jobs 0: at least 1", branch(run, out, bf16, more=("--jobs", "0")))
    refused(capsys, "beyond the run's last step", branch(run, out, bf16, more=("--horizon", "4")))
    assert not (tmp_path / "x").exists()


def test_an_arm_is_its_recipe_and_not_its_name(run: Path, tmp_path: Path, capsys: Any) -> None:
    """Written otherwise, or moved, it is the same; another under its name is not, nor a run's."""
    out, files = tmp_path / "out", [tmp_path / f"{name}.yaml" for name in ("bf16", "mine", "moved")]
    written = "model: {policy: {name: mine, recipe: {fprop_input: %s}}}\n"
    files[0].write_text("model: {policy: {name: bf16}}\n")
    files[1].write_text(written % "mxint8")
    assert branch(run, out, *files[:2], branches=1) == 0
    files[2].write_text(written % "{name: mxint8, block_size: 32}")
    assert branch(run, out, files[0], files[2], branches=1) == 0
    files[1].write_text(written % "mxint4")
    message = "holds other branches: recipe_hash of mine was"
    refused(capsys, message, branch(run, out, *files[:2], branches=1))
    compare = ["compare", str(run), str(out), "--out", str(tmp_path / "compare")]
    assert main(compare) == 0
    plain = json.loads((out / "branches.json").read_text())
    plain["arms"][0]["recipe_table"] = plain["arms"][1]["recipe_table"]
    del plain[SEAL]
    (out / "branches.json").write_text(json.dumps(sealed(plain)))
    refused(capsys, "its arm bf16 has another recipe_table than", main(compare))
    assert main([*compare, "--allow", "recipe_table"]) == 0


def test_the_first_stage_tells_how_many_branches_there_are(
    run: Path, recipes: Path, tmp_path: Path
) -> None:
    """Four; a smaller target, asked for later, takes more, by the spread of the same four."""
    arms = (recipes / "bf16.yaml", recipes / "mxfp8.yaml")
    found = []
    for target in ("1.0", "1e-9"):
        more = ("--target-se", target)
        assert branch(run, tmp_path / "out", *arms, branches=5, more=more) == 0
        found.append(read_branches(tmp_path / "out"))
    few, all_planned = found
    assert few is not None and all_planned is not None
    assert (len(few.units), len(all_planned.units)) == (4, 5)
    assert few.first_stage == all_planned.first_stage == 4
    (gaps,) = all_planned.gaps()["mxfp8"]
    (row,) = replace(all_planned, units=[{**u, "windows": None} for u in all_planned.units]).rows()
    assert row["standard_error"] == pytest.approx(np.std(gaps[:4], ddof=1) / 5**0.5)
    assert refused_target(run, tmp_path, *arms) == 2


def refused_target(run: Path, out: Path, *arms: Path) -> int:
    return branch(run, out / "none", *arms, more=("--target-se", "0"))


def test_planted_learning_rate_moves_the_loss(run: Path, recipes: Path, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    lr = {"plain": {}, "lr": {"model.optimization.lr": 1.02e-2}}
    plain = {"out": str(tmp_path / "out"), "recipes": [str(recipes / "bf16.yaml")], "overrides": lr}
    spec.write_text(json.dumps(plain))
    checkpoint = run / "checkpoints" / "step-00000003"
    arguments = ["--branch-from", str(checkpoint), "--horizon", "2", "--branches", "3"]
    assert main(["sweep", "--spec", str(spec), *arguments]) == 0
    found = read_branches(tmp_path / "out")
    assert found is not None and found.baseline == "bf16-plain"
    assert all(gap != 0 for gap in found.gaps()["bf16-lr"][0])


@pytest.mark.slow
def test_chaos_alone_is_rarely_called_a_difference(
    tmp_path: Path, tiny: Path, tiny_data: Path, recipes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BF16 against BF16 perturbed by 1e-6, 200 times with three branches of one step each."""
    small = ("--model.llama.hidden_size", "32", "--model.llama.num_hidden_layers", "1")
    small += ("--model.llama.intermediate_size", "32", "--data.seq_len", "16")
    small += ("--data.global_batch_size", "2", "--data.val_windows", "2")
    layers = ("-c", str(tiny), "-c", str(recipes / "bf16.yaml"), "--data.path", str(tiny_data))
    folder = tmp_path / "bf16-s0"
    assert main(["fit", *layers, "--run_dir", str(folder), "--checkpoint_every", "3", *small]) == 0
    point = BranchPoint.read(folder / "checkpoints" / "step-00000003")
    controls = recipes.parent / "control" / "bf16_perturbed.yaml"
    variants = [Variant("bf16", "", recipes / "bf16.yaml", {}), Variant("p", "", controls, {})]
    arms = Arms(point.config, variants)
    state = load_state(point.path)
    monkeypatch.setattr("train.sweep.continuation.load_state", lambda _: state)
    gaps = []
    for branch in range(600):
        continuation = Continuation(point.path, point.config, point.seed(branch), 1)
        found = arms.outcomes(continuation)
        assert found["bf16"] is not None and found["p"] is not None
        gaps.append(found["p"].loss - found["bf16"].loss)
    assert np.count_nonzero(gaps) > 500
    verdicts = [estimate([gaps[i : i + 3]]).verdict for i in range(0, 600, 3)]
    called = sum(verdict != "not distinguishable" for verdict in verdicts)
    print(f"{called} of {len(verdicts)} called a difference")
    assert called <= 16
