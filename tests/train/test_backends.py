"""`--model.backend` and `--model.keep`: choices that are refused where they cannot be."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from train.runs import read_runs

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
