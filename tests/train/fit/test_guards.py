"""Non-finite numbers stop a run before they reach the weights; a spike is only reported."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from data.order import BatchOrder
from lowbit import LayerPolicy
from train.checkpoints.folder import complete_checkpoints, load_state
from train.fit.spikes import SpikeReport
from train.model.module import PretrainModule
from train.runs.record import run_status

BF16 = LayerPolicy("bf16")
Fit = Callable[..., int]
EVERY = ("--trainer.accumulate_grad_batches", "2", "--checkpoint_every", "1")


def poison_layer(module: Any) -> None:
    """One output feature of a layer in the middle becomes inf."""
    layer = module.model.model.layers[1].mlp.up_proj
    layer.register_forward_hook(lambda *args: args[2].index_fill(-1, torch.tensor([3]), torch.inf))


def test_nan_loss_one_rank(
    fit: Fit, tmp_path: Path, tiny_data: Path, on_micro_batch: Callable[..., None]
) -> None:
    """In step 3: exit code 3, step 2 is the last checkpoint, and the diagnosis is right."""
    run = tmp_path / "run"
    on_micro_batch(5, poison_layer)
    assert fit(run, "mxint8", *EVERY) == 3
    assert run_status(run) == "diverged"
    saved = complete_checkpoints(run / "checkpoints")
    assert saved[-1].name == "step-00000002"
    assert all(value.isfinite().all() for value in load_state(saved[-1])["state_dict"].values())
    report = json.loads((run / "nonfinite-step-00000003-rank0.json").read_text())
    assert (report["step"], report["rank"]) == (3, 0)
    assert report["first_non_finite"]["tensor"] == "output"
    assert report["first_non_finite"]["layer"] == "model.layers.1.mlp.up_proj"
    from data.module import TokenDataModule

    module = TokenDataModule(str(tiny_data), seq_len=32, global_batch_size=8)
    module.trainer = SimpleNamespace(world_size=1, accumulate_grad_batches=2)  # type: ignore[assignment]
    module.setup()
    order = BatchOrder(len(module._train), 8, 0, module.fingerprint)
    assert [w for windows in report["windows"] for w in windows] == order.windows(2).tolist()


def test_nan_gradient(fit: Fit, tmp_path: Path, on_micro_batch: Callable[..., None]) -> None:
    """The loss is finite: the gradient norm gives it away, and clipping has not spread it."""

    def poison(module: Any) -> None:
        weight = module.model.model.layers[0].mlp.down_proj.weight
        weight.register_hook(lambda grad: grad * torch.nan)

    run = tmp_path / "run"
    on_micro_batch(2, poison)
    assert fit(run, "bf16", *EVERY) == 3
    report = json.loads((run / "nonfinite-step-00000002-rank0.json").read_text())
    layer = "model.layers.0.mlp.down_proj.weight"
    assert report["first_non_finite"] == {"tensor": "gradient", "layer": layer}


def test_a_diverged_run_resumes_from_its_last_good_checkpoint(
    fit: Fit,
    tmp_path: Path,
    on_micro_batch: Callable[..., None],
    assert_same_run: Callable[..., None],
    whole_run: Callable[..., Path],
) -> None:
    whole, run = whole_run("mxint8", *EVERY), tmp_path / "run"
    on_micro_batch(5, poison_layer)
    assert fit(run, "mxint8", *EVERY) == 3
    on_micro_batch(-1, poison_layer)
    assert fit(run, "mxint8", *EVERY) == 0
    assert run_status(run) == "finished"
    assert_same_run(run, whole)


def test_a_loss_spike_is_reported_once_and_survives_a_resume(
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = PretrainModule(LlamaConfig(vocab_size=8, hidden_size=32, num_hidden_layers=1), BF16)

    def feed(report: SpikeReport, step: int, loss: float) -> None:
        trainer: Any = SimpleNamespace(
            accumulate_grad_batches=1, is_global_zero=True, global_step=step
        )
        module.step_loss = loss
        report.on_train_batch_end(trainer, module, None, None, 0)

    first = SpikeReport()
    for step in range(25):
        feed(first, step, 3.0 + 0.01 * (step % 3))
    second = SpikeReport()
    second.load_state_dict(first.state_dict())
    feed(second, 26, 4.0)
    feed(second, 27, 3.01)
    (line,) = capsys.readouterr().out.splitlines()
    assert "loss spike at step 26: 4.0000" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--trainer.max_steps", "0"), "max_steps=0"),
        (
            (
                "--trainer.max_epochs",
                "1",
                "--trainer.limit_train_batches",
                "2",
                "--trainer.log_every_n_steps",
                "1",
            ),
            "trainer.max_epochs=1 is not taken",
        ),
        (("--data.global_batch_size", "4096"), "too few for one batch"),
    ],
)
def test_empty_dataset_or_too_few_samples(
    arguments: tuple[str, ...],
    message: str,
    fit: Fit,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What did not train to its end is no success."""
    assert fit(tmp_path / "run", "bf16", *arguments) == 2
    assert message in capsys.readouterr().err
    assert run_status(tmp_path / "run") != "finished"
