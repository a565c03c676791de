"""The recipes in configs/: what they quantize, that they train; phases, BF16 beside validation."""

import csv
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlamaConfig, LlamaForCausalLM

import lowbit.operands
from lowbit import BlockFormat, Key, Operand, QuantLinear, Randomness, convert_linears, enter_phase
from lowbit.backend import Emulate, one_by_one
from train.checkpoints.folder import AtomicCheckpointIO, complete_checkpoints
from train.cli import main
from train.config.policies import read_policy
from train.model.recipe_table import compact

Fit = Callable[..., int]
CONFIGS = Path(__file__).parents[3] / "configs"

# quantizations and rotations in one forward and backward pass of a quantized layer, by phase
COUNTS: dict[str, list[tuple[int, int]]] = {
    "bf16": [(0, 0)],
    "int8_switchback": [(4, 0)],
    "mxfp8": [(6, 0)],
    "mxint8": [(6, 0)],
    "mxint8_2d_weights": [(6, 0)],
    "mxint8_asymmetric_bf16": [(6, 0)],
    "mxint8_asymmetric_bf16_128": [(6, 0)],
    "mxint8_asymmetric_bf16_256": [(6, 0)],
    "mxint8_asymmetric_bf16_64": [(6, 0)],
    "mxint8_asymmetric_bf16_row": [(6, 0)],
    "mxint8_forward_only": [(2, 0)],
    "mxint8_late_bf16": [(6, 0), (2, 0), (0, 0)],
    "mxint8_reused_weight": [(6, 0)],
    "mxint8_symmetric_bf16": [(6, 0)],
    "nvfp4": [(6, 2), (4, 2)],
    "nvfp4_row": [(6, 2), (4, 2)],
}


class Counting(Emulate):
    """Counts quantizations."""

    operands = one_by_one

    def __init__(self) -> None:
        self.quantized = 0

    def operand(
        self, x: torch.Tensor, format: BlockFormat | None, dim: int, key: Key | None
    ) -> Operand:
        self.quantized += format is not None
        return super().operand(x, format, dim, key)


def test_every_recipe_is_counted_below() -> None:
    assert set(COUNTS) == {path.stem for path in (CONFIGS / "recipe").glob("*.yaml")}


@pytest.mark.parametrize("name", COUNTS)
def test_each_operand_is_quantized_once_per_use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = yaml.safe_load((CONFIGS / "recipe" / f"{name}.yaml").read_text())
    policy = read_policy(plain["model"]["policy"])
    config = LlamaConfig(
        hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    convert_linears(model, policy, backend=Counting(), randomness=Randomness(0))
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    for layer in layers:
        layer.backend = Counting()
    rotations: Counter[str] = Counter()
    original = lowbit.operands.rotate
    monkeypatch.setattr(
        lowbit.operands, "rotate", lambda *a, **k: rotations.update("r") or original(*a, **k)
    )
    ids = torch.arange(32)[None]
    assert len(policy.phases) + 1 == len(COUNTS[name])
    for phase, (quantized, rotated) in zip((None, *policy.phases), COUNTS[name], strict=True):
        enter_phase(model, policy, phase)
        before = [layer.backend.quantized for layer in layers]
        rotations.clear()
        model(input_ids=ids, labels=ids).loss.backward()
        counts = {x.backend.quantized - b for x, b in zip(layers, before, strict=True)}
        assert counts == {quantized}
        assert rotations["r"] == rotated * len(layers)


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_every_recipe_trains_the_quickstart_model(
    name: str, tiny_data: Path, tmp_path: Path
) -> None:
    layers = (CONFIGS / "model" / "quickstart.yaml", CONFIGS / "recipe" / f"{name}.yaml")
    arguments = [part for path in layers for part in ("-c", str(path))]
    arguments += ["--data.path", str(tiny_data), "--run_dir", str(tmp_path / "run")]
    arguments += ["--data.seq_len", "64", "--data.global_batch_size", "4"]
    arguments += ["--trainer.max_steps", "20", "--model.optimization.warmup_steps", "2"]
    arguments += ["--data.val_windows", "1", "--checkpoint_every", "20"]
    arguments += ["--trainer.accelerator", "cpu"]
    assert main(["fit", *arguments]) == 0
    losses = [float(row["train/loss"]) for row in rows(tmp_path / "run")]
    assert len(losses) == 20
    assert all(map(math.isfinite, losses))
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.5


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [
            {k: v for k, v in row.items() if k != "tokens_per_second"}
            for row in csv.DictReader(file)
        ]


def weights(run: Path) -> dict[str, Any]:
    point = complete_checkpoints(run / "checkpoints")[-1]
    state: dict[str, Any] = AtomicCheckpointIO().load_checkpoint(point)["state_dict"]
    return state


EVERY = ("--checkpoint_every", "1", "--keep_checkpoints", "9")
PHASES = ("--model.policy.phases", "[{start: 0.5, gemms: [dgrad, wgrad]}]")  # of 6 steps: 3


def test_resume_across_a_phase_switch_is_bitwise(fit: Fit, tmp_path: Path) -> None:
    """With stochastic rounding, rotation, 2-D blocks, a kept block and two micro-batches."""
    split = ("--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "6")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert fit(whole, "nvfp4", *PHASES, *EVERY, *split) == 0
    shutil.copytree(whole, parts)
    record = json.loads((whole / "run.json").read_text())
    assert record["phases"] == [{"start": 0.5, "first_step": 4, "gemms": ["dgrad", "wgrad"]}]
    for stop in (4, 3, 2):
        for later in complete_checkpoints(parts / "checkpoints")[stop:]:
            AtomicCheckpointIO().remove_checkpoint(later)
        assert fit(parts, "nvfp4", *PHASES, *EVERY, *split) == 0
        assert rows(parts) == rows(whole), stop
        found, expected = weights(parts), weights(whole)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_phase_changes_the_steps_from_its_first_on(fit: Fit, tmp_path: Path) -> None:
    for run, phases in (("always", "[]"), ("phased", PHASES[1])):
        fit(
            tmp_path / run,
            "nvfp4",
            "--model.policy.phases",
            phases,
            "--model.validate_bf16",
            "true",
        )
    always, phased = rows(tmp_path / "always"), rows(tmp_path / "phased")
    differing = [row["step"] for row, other in zip(always, phased, strict=True) if row != other]
    assert differing == ["4", "5", "6"]
    # the last phase's forward pass is BF16, and so is its validation
    assert [row["val/loss"] == row["val/loss_bf16"] for row in phased if row["val/loss"]] == [
        False,
        True,
    ]


def test_validate_computes_as_the_checkpoints_last_update_did(
    fit: Fit, tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    fit(run, "nvfp4", *PHASES, *EVERY)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config = {key: config[key] for key in ("seed_everything", "model", "data", "trainer")}
    (tmp_path / "validate.yaml").write_text(yaml.safe_dump(config))
    for step in (3, 6):
        point = run / "checkpoints" / f"step-{step:08d}"
        capsys.readouterr()
        arguments = ["-c", str(tmp_path / "validate.yaml"), "--checkpoint", str(point)]
        assert main(["validate", *arguments]) == 0
        printed = capsys.readouterr().out.split()
        loss = float(printed[printed.index("val/loss") + 1])
        assert loss == pytest.approx(float(rows(run)[step - 1]["val/loss"]), abs=1e-6)


def test_bf16_beside_validation(fit: Fit, tmp_path: Path) -> None:
    on = ("--model.validate_bf16", "true")
    for recipe in ("bf16", "mxint8"):
        fit(tmp_path / recipe, recipe, *on)
    fit(tmp_path / "without", "mxint8")
    same = {row["val/loss"] == row["val/loss_bf16"] for row in rows(tmp_path / "bf16")}
    assert same == {True}
    measured = [row for row in rows(tmp_path / "mxint8") if row["val/loss"]]
    gaps = [float(row["val/loss"]) - float(row["val/loss_bf16"]) for row in measured]
    assert len(gaps) == 2
    assert all(0 < abs(gap) < 0.02 for gap in gaps)
    tags = EventAccumulator(str(tmp_path / "mxint8")).Reload().Tags()["scalars"]
    assert {"val/loss", "val/loss_bf16"} <= set(tags)
    plain = [row | {"val/loss_bf16": ""} for row in rows(tmp_path / "mxint8")]
    assert plain == rows(tmp_path / "without")


@pytest.mark.parametrize("recipe", ["mxint8", "nvfp4"])
def test_gradient_checkpointing_changes_no_bit(fit: Fit, tmp_path: Path, recipe: str) -> None:
    for run, value in (("off", "false"), ("on", "true")):
        fit(tmp_path / run, recipe, "--model.gradient_checkpointing", value)
    assert rows(tmp_path / "on") == rows(tmp_path / "off")


def test_the_resolved_table_is_printed_once(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path / "run", "nvfp4", "--trainer.max_steps", "1")
    text = capsys.readouterr().out
    gradient = "grad_output nvfp4(rounding=stochastic)"
    lines = [
        "  model.layers.0.self_attn.{q_proj,k_proj,v_proj,o_proj}",
        "  model.layers.0.mlp.{gate_proj,up_proj,down_proj}",
        "    fprop: input nvfp4, weight nvfp4(block_size=(16, 16))",
        f"    dgrad: {gradient}, weight nvfp4(block_size=(16, 16))",
        f"    wgrad: {gradient} hadamard(16, signs 0), input nvfp4 hadamard(16, signs 0)",
        "  model.layers.1.self_attn.{q_proj,k_proj,v_proj,o_proj}",
        "  model.layers.1.mlp.{gate_proj,up_proj,down_proj}",
        "  lm_head",
        "    all six operands: bf16",
    ]
    assert text.count("\n".join(lines)) == 1
    assert "7 of 15 linear layers quantized under nvfp4" in text


def test_names_are_grouped_by_block_and_parent() -> None:
    names = [f"h.{i}.{n}" for i in (0, 1, 2, 5) for n in ("a.x", "a.y")] + ["head", "h.7.b"]
    assert compact(names) == ["h.0-2,5.a.{x,y}", "head", "h.7.b"]
