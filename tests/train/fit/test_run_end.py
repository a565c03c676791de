"""A run's end, and whatever it saves, is checked as its steps are."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from train.checkpoints.folder import complete_checkpoints, load_state
from train.cli import main
from train.compare.gaps import compare_pair
from train.model.module import PretrainModule
from train.runs.metrics import perplexity
from train.runs.record import read_record
from train.runs.run import read_run

Fit = Callable[..., int]
ONE = ("--trainer.max_steps", "1", "--trainer.val_check_interval", "1")
HUGE = ("--model.optimization.lr", "1e38")


def moments(key: str) -> Callable[[PretrainModule], None]:
    """One of the optimizer's moments is infinite before the last update."""

    def act(module: PretrainModule) -> None:
        states: Any = list(module.trainer.optimizers[0].state.values())
        states[2][key].view(-1)[7] = torch.inf

    return act


def weight(value: float) -> Callable[[PretrainModule], None]:
    """A weight that no loss depends on: the embedding of a token that no text holds."""

    def act(module: PretrainModule) -> None:
        with torch.no_grad():
            module.model.model.embed_tokens.weight[319, 0] = value

    return act


ENDS = {
    "an update too large": (-1, None, (*ONE, *HUGE), 1),
    "first moment": (5, moments("exp_avg"), (), 6),
    "second moment, whose weights stay finite": (5, moments("exp_avg_sq"), (), 6),
    "a weight that no loss shows": (5, weight(math.nan), (), 6),
    "the same in the middle, where it is saved": (1, weight(-math.inf), (), 2),
}


@pytest.mark.parametrize("end", ENDS)
def test_what_is_not_finite_is_neither_saved_nor_exported(
    end: str, fit: Fit, tmp_path: Path, on_micro_batch: Callable[..., None]
) -> None:
    number, act, arguments, step = ENDS[end]
    if act:
        on_micro_batch(number, act)
    run = tmp_path / "run"
    assert fit(run, "bf16", "--checkpoint_every", "2", *arguments) == 3
    record = read_record(run)
    assert record["status"] == "diverged" and f"step {step}" in record["error"]
    assert not (run / "hf").exists()
    saved = complete_checkpoints(run / "checkpoints")
    assert all(path.name < f"step-{step:08d}" for path in saved)
    report = json.loads((run / f"nonfinite-step-{step:08d}-rank0.json").read_text())
    assert report["message"] == record["error"]
    for path in saved:
        assert all(x.isfinite().all() for x in load_state(path)["state_dict"].values())


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_validation_that_is_not_finite_ends_the_run(
    loss: float, fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no comparison takes the one before in its place."""
    original = PretrainModule._validate

    def validate(self: PretrainModule, batch: Any, metric: Any) -> Any:
        found = original(self, batch, metric)
        if self.trainer.global_step == 6:
            metric.update(torch.tensor(loss))
        return found

    monkeypatch.setattr(PretrainModule, "_validate", validate)
    run = tmp_path / "bf16-s0"
    assert fit(run, "bf16") == 3
    assert read_record(run)["status"] == "diverged" and not (run / "hf").exists()
    found = read_run(run)
    assert found.last_validation is None and len(found.val_curve[1]) == 1


def test_a_validation_loss_without_a_perplexity_is_no_error(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 709.8 nats on FP64 has no number for it."""
    assert perplexity(709.0) == math.exp(709.0) and perplexity(710.0) == math.inf
    original = PretrainModule._validate

    def validate(self: PretrainModule, batch: Any, metric: Any) -> Any:
        found = original(self, batch, metric)
        metric.update(torch.tensor(1e6), weight=1e6)
        return found

    monkeypatch.setattr(PretrainModule, "_validate", validate)
    run = tmp_path / "bf16-s0"
    assert fit(run, "bf16") == 0
    assert read_run(run).metrics["val/perplexity"][-1] == math.inf
    assert main(["compare", str(run), "--out", str(tmp_path / "out")]) == 0
    (row,) = json.loads((tmp_path / "out/compare.json").read_text())["runs"]
    assert row["val_loss"] > 4e5 and row["perplexity"] is None


@pytest.mark.parametrize("last", ["nan", "inf", "-inf"])
def test_a_finished_run_of_before_is_judged_by_its_last_validation(
    last: str, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    """Older lowbits finished such runs; a bound must not pass by an earlier cell."""
    losses = [3.0, 2.0, 2.0, 2.0]
    for seed in range(3):
        make_run(tmp_path / f"s/bf16-s{seed}", losses, {2: 2.0, 4: 2.0 + seed / 64}, seed=seed)
        val: Any = {2: 2.0, 4: last}
        make_run(tmp_path / f"s/a-s{seed}", losses, val, recipe="a", seed=seed)
    assert main(["compare", str(tmp_path / "s"), "--max-gap", "0.5"]) == 1
    a, b = ({0: read_run(tmp_path / f"s/{name}-s0")} for name in ("bf16", "a"))
    assert b[0].status == "diverged" and b[0].last_validation is None
    assert compare_pair(a, b).mean is None
