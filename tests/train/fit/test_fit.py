"""A run from start to end: what it leaves, that it learns, that it resumes bit for bit."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlamaForCausalLM

from train.checkpoints.folder import AtomicCheckpointIO, complete_checkpoints
from train.model.module import PretrainModule

Fit = Callable[..., int]


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [
            {k: v for k, v in row.items() if k != "tokens_per_second"}
            for row in csv.DictReader(file)
        ]


def final_state(run: Path) -> dict[str, Any]:
    state = AtomicCheckpointIO().load_checkpoint(complete_checkpoints(run / "checkpoints")[-1])
    del state["origin"]["metrics"]  # of bytes that hold times
    return state


def assert_same(a: Any, b: Any) -> None:
    """Bitwise, through nested containers."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    else:
        assert a == b


RUN_FILES = {  # what others read: it may grow, with a word in CHANGELOG.md
    *("run.json", "metrics.csv", "config.yaml", "hparams.yaml", "events.out.tfevents", "lock"),
    *("checkpoints/step-00000006/manifest.json", "checkpoints/step-00000006/state.ckpt"),
    *("hf/README.md", "hf/config.json", "hf/generation_config.json", "hf/lowbit.json"),
    *("hf/model.safetensors", "hf/tokenizer.json", "hf/tokenizer_config.json"),
}


def test_a_finished_run_is_complete(fit: Fit, tmp_path: Path, tiny_data: Path) -> None:
    run = tmp_path / "run"
    assert fit(run, "mxint8") == 0
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["recipe"] == "mxint8"
    assert len(record["recipe_table"]) == 14
    assert set(record["recipe_table"][0].values()) == {"model.layers.0.self_attn.q_proj", "mxint8"}
    files = (path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())
    assert {re.sub(r"(tfevents)\..*", r"\1", file) for file in files} == RUN_FILES
    metrics = rows(run)
    assert [int(row["step"]) for row in metrics] == list(range(1, 7))
    losses = [float(row["train/loss"]) for row in metrics]
    assert losses[-1] < losses[0] - 0.5
    assert [row["step"] for row in metrics if row["val/loss"]] == ["3", "6"]
    assert fit(run, "mxint8") == 0  # a second call has nothing to do
    assert rows(run) == metrics


def test_exported_weights_load_with_the_same_logits(fit: Fit, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(run, "bf16")
    state = final_state(run)["state_dict"]
    exported = LlamaForCausalLM.from_pretrained(run / "hf", dtype=torch.float32)
    ids = torch.arange(64)[None]
    loaded = LlamaForCausalLM(exported.config)
    loaded.load_state_dict(
        {
            k.removeprefix(
                "model.",
            ): v
            for k, v in state.items()
        }
    )
    with torch.no_grad():
        assert torch.equal(exported(ids).logits, loaded.eval()(ids).logits)


@pytest.mark.parametrize("recipe", ["bf16", "mxint8"])
def test_resume_is_bitwise(fit: Fit, tmp_path: Path, recipe: str) -> None:
    """Dropout draws from the RNG, two micro-batches a step; step 3 also validates."""
    options = ("--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "3")
    options += ("--checkpoint_every", "1", "--keep_checkpoints", "9")
    whole = tmp_path / "whole"
    assert fit(whole, recipe, *options) == 0
    for stop in (1, 3, 5):
        parts = tmp_path / f"stopped after {stop}"
        shutil.copytree(whole, parts)
        point = parts / "checkpoints" / f"step-{stop:08d}"
        for later in complete_checkpoints(parts / "checkpoints")[stop:]:
            AtomicCheckpointIO().remove_checkpoint(later)
        torch.manual_seed(99)  # the resumed run must not depend on this
        assert fit(parts, recipe, *options, "--resume", str(point)) == 0
        assert rows(parts) == rows(whole)
        assert_same(final_state(parts), final_state(whole))
        events = EventAccumulator(str(parts)).Reload()
        for tag in events.Tags()["scalars"]:
            steps = [event.step for event in events.Scalars(tag)]
            assert steps == sorted(set(steps)), tag
        assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 7))


def test_pairing(fit: Fit, tmp_path: Path) -> None:
    """Same initial weights and the same first batch under every recipe: only numerics differ."""
    records = {}
    for recipe in ("bf16", "mxint8", "mxfp8"):
        fit(tmp_path / recipe, recipe, "--trainer.max_steps", "1")
        records[recipe] = json.loads((tmp_path / recipe / "run.json").read_text())
    assert len({record["initial_weights"] for record in records.values()}) == 1
    assert len({record["data"]["fingerprint"] for record in records.values()}) == 1
    losses = {recipe: float(rows(tmp_path / recipe)[0]["train/loss"]) for recipe in records}
    assert len(set(losses.values())) == 3
    assert max(losses.values()) - min(losses.values()) < 0.01


def test_init_from_starts_from_pretrained_weights(fit: Fit, tmp_path: Path) -> None:
    fit(tmp_path / "first", "bf16")
    start = ("--model.init_from", str(tmp_path / "first" / "hf"), "--trainer.max_steps", "1")
    fit(tmp_path / "second", "mxint8", *start)
    first, second = (
        json.loads((tmp_path / n / "run.json").read_text()) for n in ("first", "second")
    )
    assert second["initial_weights"] != first["initial_weights"]
    assert second["init_from"].endswith("hf")
    assert float(rows(tmp_path / "second")[0]["train/loss"]) < 5.0


def test_clamping_is_logged(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.fit.clamping.EVERY_N_STEPS", 2)
    fit(tmp_path / "rceil", "mxint8", "--trainer.max_steps", "2")
    fit(tmp_path / "bf16_scale", "mxint8_asymmetric_bf16", "--trainer.max_steps", "2")
    last = [rows(tmp_path / name)[-1] for name in ("rceil", "bf16_scale")]
    assert float(last[0]["quant/clamped"]) == float(last[0]["quant/minus_128"]) == 0.0
    assert float(last[1]["quant/minus_128"]) > 0.0005


def test_non_finite_loss_stops_before_the_update(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = PretrainModule.configure_model

    def poison(self: PretrainModule) -> None:
        original(self)
        self.model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")

    monkeypatch.setattr(PretrainModule, "configure_model", poison)
    assert fit(tmp_path / "run", "mxint8") == 3
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "diverged"
