"""Lightning's Trainer, field by field; what a library refuses while a run is built."""

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from train.cli import main
from train.config.building import building
from train.config.trainer_fields import REFUSED, TAKEN
from train.runs.declaration import declared_key

Fit = Callable[..., int]


def test_every_field_of_the_installed_lightning_is_taken_or_refused() -> None:
    fields = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert sorted([*TAKEN, *REFUSED]) == sorted(fields)
    assert [field for field in fields if declared_key(f"trainer.{field}") is None] == []


VALUES = {  # of a refused field, where 3 is none of it
    "plugins": "lightning.pytorch.plugins.io.TorchCheckpointIO",
    "default_root_dir": "elsewhere",
    "model_registry": "name",
    "gradient_clip_algorithm": "value",
    **dict.fromkeys(("fast_dev_run", "barebones", "sync_batchnorm"), "true"),
    **dict.fromkeys(("enable_checkpointing", "enable_progress_bar"), "true"),
    "use_distributed_sampler": "true",
}
ERRORS: dict[tuple[str, ...], str] = {
    **{(f"--trainer.{f}", VALUES.get(f, "3")): f"trainer.{f}=" for f in REFUSED},
    ("--trainer.gradient_clip_val", "0.5"): "use model.optimization.max_grad_norm",
    ("--trainer.gradient_clip_val=0.5",): "use model.optimization.max_grad_norm",
    ("--trainer.logger.save_dir", "logs"): "trainer.logger: ",
    ("-c", "trainer: {overfit_batches: 1}"): "trainer.overfit_batches=1",
    # precisions without a baseline
    ("--trainer.precision", "64-true"): "bf16-mixed, 32-true",
    ("--trainer.precision", "16-mixed"): "bf16-mixed, 32-true",
    ("--trainer.precision", "transformer-engine"): "bf16-mixed, 32-true",
    # null where something is expected, and keys that are none
    ("-c", "model: {optimization: null}"): "model.optimization is null",
    ("-c", "model: {keep: null}"): "model.keep is null",
    ("-c", "model: {policy: {name: x, recipe: null}}"): "model.policy.recipe is null",
    ("-c", "model: {policy: {name: x, rules: null}}"): "model.policy.rules is null",
    ("-c", "model: {policy: {name: x, skip: null}}"): "model.policy.skip is null",
    ("-c", "model: {llama: null}"): "model.llama",
    ("-c", "trainer: null"): "trainer is null",
    ("-c", "trainer: {max_steps: null}"): "max_steps",
    ("-c", "data: null"): "data.seq_len",
    ("-c", "modle: {}"): "did you mean model?",
    ("-c", "check_point_every: 3"): "did you mean checkpoint_every?",
    ("--run_dri", "x"): "did you mean --run_dir?",
    ("--model.optimisation.lr", "1"): "did you mean --model.optimization.lr?",
    ("--trainer.max_step=1",): "did you mean --trainer.max_steps?",
    # values that a library refuses in its own way, or not at all
    ("--trainer.val_check_interval", "0"): "trainer.val_check_interval=0",
    ("--trainer.val_check_interval", "0.5"): "trainer.val_check_interval=0.5",
    ("--trainer.val_check_interval", "-3"): "trainer.val_check_interval=-3",
    ("--trainer.accumulate_grad_batches", "0"): "trainer.accumulate_grad_batches=0",
    ("--trainer.accumulate_grad_batches", "-2"): "trainer.accumulate_grad_batches=-2",
    ("--trainer.max_steps", "-5"): "trainer.max_steps=-5",
    ("--trainer.max_steps", "-1"): "trainer.max_steps=-1",
    ("--trainer.accelerator", "foo"): "accelerator='foo'",
    ("--trainer.devices", "0"): "devices='0'",
    ("--trainer.num_nodes", "0"): "num_nodes",
    ("--trainer.profiler", "foo"): "profiler",
    ("--model.llama.hidden_act", "foo"): "hidden_act=foo: unknown; known are",
    ("--model.llama.rope_parameters", "{rope_type: foo, rope_theta: 1.0}"): "rope_type=foo",
    ("--model.llama.hidden_size", "0"): "hidden_size=0",
    ("--model.llama.num_hidden_layers", "0"): "num_hidden_layers=0",
    ("--model.llama.num_attention_heads", "0"): "num_attention_heads=0",
    ("--model.llama.num_key_value_heads", "-1"): "num_key_value_heads=-1",
    ("--model.llama.vocab_size", "0"): "vocab_size=0",
    ("--model.llama.intermediate_size", "0"): "intermediate_size=0",
    ("--model.optimization.lr", "abc"): "model.optimization.lr",
}


@pytest.mark.parametrize("arguments", ERRORS, ids=" ".join)
def test_a_mistake_is_one_line_before_anything_is_written(
    arguments: tuple[str, ...], fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path / "run", "mxint8", *arguments) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "error" in text]
    assert line.startswith("lowbit: error: ")
    assert ERRORS[arguments] in line
    assert len(line) <= 200
    assert not (tmp_path / "run").exists()


def test_the_home_folder_is_meant(
    fit: Fit, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tiny_data.parent))
    for index, home in enumerate(("~", "$HOME", "${HOME}")):
        few = ("--data.path", f"{home}/{tiny_data.name}", "--trainer.max_steps", "1")
        assert fit(tmp_path / f"run{index}", "bf16", *few) == 0


def test_an_error_of_ours_stays_a_traceback() -> None:
    """And a library's becomes a line that says of what kind it is."""
    from torch import nn

    from lowbit.policy import LayerPolicy

    with pytest.raises(TypeError), building():
        LayerPolicy("x", skip=None).resolve(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="KeyError: 'foo'"), building():
        nn.ModuleDict()["foo"]


def test_validate_takes_what_fit_wrote(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert fit(run, "mxint8", "--trainer.max_steps", "2") == 0
    last = (run / "metrics.csv").read_text().splitlines()[-1].split(",")
    columns = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    capsys.readouterr()
    written = ["validate", "-c", str(run / "config.yaml")]
    point = ["--checkpoint", str(run / "checkpoints" / "step-00000002")]
    assert main([*written, *point]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert printed["val/loss"] == f"{float(last[columns.index('val/loss')]):.6f}"
    assert main([*written, "--data.val_windows", "100000"]) == 2
    assert "validation windows" in capsys.readouterr().err
