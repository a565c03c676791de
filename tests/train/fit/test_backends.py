"""Choices of how a layer computes: what they change, and where they are refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from train.runs.run import read_runs

Fit = Callable[..., int]


def test_the_integer_backend_is_chosen_and_recorded(fit: Fit, tmp_path: Path) -> None:
    losses = {}
    for backend in ("emulate", "integer"):
        run = tmp_path / backend
        assert fit(run, "mxint8", "--model.backend", backend, "--trainer.max_steps", "3") == 0
        assert json.loads((run / "run.json").read_text())["backend"] == [backend]
        (read,) = read_runs([run])
        losses[backend] = list(read.metrics["train/loss"])
    assert losses["integer"] == pytest.approx(losses["emulate"], rel=1e-3)


@pytest.mark.parametrize("recipe", ["mxfp8", "mxint8_reused_weight", "mxint8_2d_weights"])
def test_recipes_without_an_integer_product_are_refused(
    recipe: str, fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path / "run", recipe, "--model.backend", "integer") == 2
    assert "the integer backend" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_layers_keep_changes_no_loss(fit: Fit, tmp_path: Path) -> None:
    losses = []
    for kept in ("false", "true"):
        keep = (f"--model.keep.quantized_weights={kept}", f"--model.keep.quantized_inputs={kept}")
        accumulation = ("--trainer.accumulate_grad_batches", "2", "--trainer.max_steps", "3")
        assert fit(tmp_path / kept, "mxfp8", *keep, *accumulation) == 0
        (read,) = read_runs([tmp_path / kept])
        losses.append(list(read.metrics["train/loss"]))
    assert losses[0] == losses[1]


def test_compiled_blocks_cannot_keep_weights(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = ("--model.keep.quantized_weights", "true", "--model.compile_blocks", "true")
    assert fit(tmp_path / "run", "mxint8", *both) == 2
    assert "model.keep.quantized_weights with model.compile_blocks" in capsys.readouterr().err


# importing inductor's C++ back end warns about torch.jit; Dynamo looks at .grad of what is no leaf
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")
@pytest.mark.slow
def test_compiled_blocks_compute_the_same(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the order of sums in FP32, which may give a code in many thousands another value."""
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # no pool of processes
    torch._dynamo.reset()
    counters.clear()
    few = ("--model.llama.num_hidden_layers", "1", "--model.llama.attention_dropout", "0")
    few += ("--trainer.max_steps", "3", "--trainer.limit_val_batches", "0")
    losses = []
    for compiled in ("false", "true"):
        choice = ("--trainer.precision", "32-true", "--model.compile_blocks", compiled)
        assert fit(tmp_path / compiled, "mxint8", *few, *choice) == 0
        (read,) = read_runs([tmp_path / compiled])
        losses.append(list(read.metrics["train/loss"]))
        assert counters["stats"]["unique_graphs"] == (compiled == "true")  # for all steps
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
