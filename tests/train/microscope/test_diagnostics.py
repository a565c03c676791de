"""The microscope sees what the offline statistics see, and a run does not notice it."""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lowbit import block_format, unquantized
from lowbit.gradient_stats import gradient_error
from train.analysis.operands import Look, observe
from train.microscope.microscope import Diagnostics, Microscope
from train.microscope.store import DiagnosticsStore
from train.model.module import PretrainModule
from train.subjects.text import Text

Fit = Callable[..., int]
FORMATS = ("mxfp8", "nvint4")
PLAN = ("--diagnostics.formats", "[mxfp8, nvint4]", "--diagnostics.every_n_steps", "2")
NO_DROPOUT = ("--model.llama.attention_dropout", "0", "--trainer.precision", "32-true")


def read(run: Path, table: str) -> list[dict[str, Any]]:
    return DiagnosticsStore(run / "diagnostics").read(table)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Model, batch and gradients of the microscope's first step, copied before the update."""
    seen: list[dict[str, Any]] = []
    original = Microscope.on_before_optimizer_step

    def look(self: Microscope, trainer: Any, module: PretrainModule, optimizer: Any) -> None:
        if self._measurement is not None and not seen:
            weights = {n: p.detach().clone() for n, p in module.model.named_parameters()}
            grads = {n: layer.weight.grad.clone() for n, layer in self.layers.items()}  # type: ignore[union-attr]
            batch = {name: x.clone() for name, x in self._batch.items()}
            seen.append({"module": module, "weights": weights, "batch": batch, "grads": grads})
        original(self, trainer, module, optimizer)

    monkeypatch.setattr(Microscope, "on_before_optimizer_step", look)
    yield seen


def test_equals_the_offline_statistics(
    fit: Fit, tmp_path: Path, watched: list[dict[str, Any]]
) -> None:
    """Of the same weights and batch, in FP32; the gradients against a plain backward pass."""
    assert fit(tmp_path / "run", "mxint8", *PLAN, *NO_DROPOUT) == 0
    [seen] = watched
    model = seen["module"].model
    model.load_state_dict(seen["weights"])
    batch = seen["batch"]
    tokens = torch.cat([batch["input_ids"], batch["labels"][:, -1:]], 1)
    assert torch.equal(tokens[:, 1:], batch["labels"])
    for parameter in model.parameters():
        parameter.grad = None
    with unquantized(model):
        seen["module"].mean_loss(batch).backward()
        reference = {n: m.weight.grad.clone() for n, m in seen["module"].quantized_layers.items()}
    rows = [row for row in read(tmp_path / "run", "operands") if row["step"] == 2]
    look = Look(tuple(map(block_format, ("mxint8", *FORMATS))))
    offline = observe(model, Text(tokens, "the batch"), look, ["*layers*"])
    expected = {(r["layer"], r["operand"], r["format"]): r for r in offline.qsnr}
    assert len(rows) == len(expected) == 2 * 7 * 6 * 3
    for row in rows:
        other = expected[row["layer"], row["operand"], row["format"]]
        assert row["trained"] == (row["format"] == "mxint8")
        assert (row["type"], row["depth"]) == (other["type"], other["depth"])
        for name in ("qsnr_db", "underflow", "crest"):
            assert row[name] == other[name], (row["layer"], row["operand"], row["format"], name)
    for row in read(tmp_path / "run", "gradients")[:14]:
        error = gradient_error(reference[row["layer"]], seen["grads"][row["layer"]])
        assert 0 < row["relative_l2"] == pytest.approx(float(error.relative_l2), rel=1e-6)
        assert row["cosine"] == pytest.approx(float(error.cosine), rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mxint8", "nvfp4"])
def test_the_run_does_not_notice(
    fit: Fit, tmp_path: Path, recipe: str, assert_same_run: Callable[[Path, Path], None]
) -> None:
    """With dropout, stochastic rounding, rotation and two micro-batches a step: bit for bit."""
    more = ("--trainer.accumulate_grad_batches", "2", "--model.gradient_checkpointing", "true")
    more += ("--trainer.max_steps", "4") if recipe == "mxint8" else ()
    assert fit(tmp_path / "off", recipe, *more) == 0
    assert fit(tmp_path / "on", recipe, *more, *PLAN) == 0
    assert_same_run(tmp_path / "off", tmp_path / "on")
    assert not (tmp_path / "off/diagnostics").exists()
    assert {row["step"] for row in read(tmp_path / "on", "operands")} >= {2, 4}
    assert all(math.isfinite(row["qsnr_db"]) for row in read(tmp_path / "on", "operands"))


@pytest.mark.parametrize("plan", [(), PLAN], ids=["off", "between looks"])
def test_no_hook_where_nothing_is_looked_at(
    fit: Fit, tmp_path: Path, on_micro_batch: Callable[..., None], plan: tuple[str, ...]
) -> None:
    hooks: list[int] = []

    def count(module: PretrainModule) -> None:
        callbacks = module.trainer.callbacks  # type: ignore[attr-defined]
        assert any(isinstance(callback, Microscope) for callback in callbacks) == bool(plan)
        for layer in module.model.modules():
            hooks.append(len(layer._forward_hooks) + len(layer._backward_hooks))

    on_micro_batch(2, count)  # of step 3: step 2 has been looked at
    assert fit(tmp_path / "run", "mxint8", *plan, "--trainer.max_steps", "3") == 0
    assert hooks and set(hooks) == {0}


@pytest.mark.slow
def test_a_resume_cuts_back_and_goes_on(fit: Fit, tmp_path: Path) -> None:
    stopped, often = tmp_path / "stopped", ("--checkpoint_every", "3")
    assert fit(stopped, "mxint8", *PLAN, *often) == 0
    whole = {table: read(stopped, table) for table in ("operands", "gradients")}
    later = stopped / "checkpoints/step-00000003"
    for name in ("operands-00000099.tmp", "operands-00000099.parquet"):  # of a longer run, killed
        (stopped / "diagnostics" / name).write_text("half")
    assert fit(stopped, "mxint8", *PLAN, *often, "--resume", str(later)) == 0
    assert not list((stopped / "diagnostics").glob("*.tmp"))
    for table, rows in whole.items():
        assert {row["step"] for row in rows} == {2, 4, 6}
        assert read(stopped, table) == rows


def test_windows_layers_and_operands_choose(fit: Fit, tmp_path: Path) -> None:
    choice = ("--diagnostics.layers", "['*down_proj']", "--diagnostics.operands", "['wgrad_*']")
    window = ("--diagnostics.windows", "[[3, 4]]", "--diagnostics.every_n_steps", "1")
    assert fit(tmp_path / "run", "bf16", *PLAN[:2], *choice, *window) == 0
    rows = read(tmp_path / "run", "operands")
    assert {row["step"] for row in rows} == {3, 4}
    assert {row["type"] for row in rows} == {"down_proj"}
    assert {row["operand"] for row in rows} == {"wgrad_input", "wgrad_grad_output"}
    assert {row["format"] for row in rows} == set(FORMATS)
    assert read(tmp_path / "run", "gradients") == []  # nothing is quantized
    events = EventAccumulator(str(tmp_path / "run"), {"images": 0, "histograms": 0})
    events.Reload()
    tags = events.Tags()
    assert "diagnostics_qsnr_db/wgrad_input/mxfp8" in tags["scalars"]
    assert "diagnostics_qsnr_db/nvint4" in tags["images"]
    [first, _] = events.Histograms("diagnostics_crest/wgrad_input/block_32")
    assert first.histogram_value.num == 2 * 256 * 128 // 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--diagnostics.layers", "['*nothing']"), "'\\*nothing' matches no linear layer"),
        (("--diagnostics.operands", "['fprop']"), "'fprop' matches none of"),
        (("--diagnostics.every_n_steps", "0"), "every_n_steps=0"),
        (("--diagnostics.windows", "[[3, 4]]"), "3 to 4 holds no multiple"),
        (("--diagnostics.formats", "[mxint9]"), "mxint9"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    fit: Fit, tmp_path: Path, arguments: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path / "run", "mxint8", *arguments) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_a_plan_names_its_steps() -> None:
    plan = Diagnostics(windows=((1, 20), (95, 100)), every_n_steps=10)
    assert [step for step in range(1, 200) if plan.wants(step)] == [10, 20, 100]
