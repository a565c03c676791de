"""configs/launch: the study's runs as published, complete, and able to run."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lowbit import kernels
from train.config.strict_yaml import load_yaml
from train.distributed.fsdp import FullySharded
from train.fit.configuration import RunCLI
from train.model.initial import random_model
from train.model.step import token_losses

ROOT = Path(__file__).parents[3]
LAUNCH = ROOT / "configs" / "launch"
COMMANDS = re.findall(
    r"^(?:sbatch )?scripts/(?:launch_torchrun.sh|slurm.sbatch) (.*)$",
    (ROOT / "docs" / "launch.md").read_text(),
    re.MULTILINE,
)
# arXiv 2510.25602, Table 9: layers, hidden, FFN, heads, KV heads, windows, peak lr, tokens
STUDY = {
    "145m": (12, 1024, 3072, 16, 4, 256, 1e-3, 20e9),
    "1b": (16, 2048, 8192, 32, 8, 512, 6e-4, 100e9),
    "3b": (28, 3072, 8192, 24, 8, 512, 6e-4, 200e9),
}


def built(size: str, data: Path, run_dir: Path, *overrides: str) -> RunCLI:
    """Everything of the run but its processes and weights, on this machine's one CPU."""
    here = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--run_dir", str(run_dir)]
    layers = [
        "-c",
        str(LAUNCH / f"{size}-fsdp2.yaml"),
        "-c",
        str(ROOT / "configs/recipe/mxint8.yaml"),
    ]
    return RunCLI("fit", [*layers, "--data.path", str(data), *here, *overrides])


@pytest.mark.parametrize("size", STUDY)
def test_the_study_s_runs(size: str, tiny_data: Path, tmp_path: Path) -> None:
    layers, hidden, ffn, heads, kv_heads, windows, lr, tokens = STUDY[size]
    cli = built(size, tiny_data, tmp_path / "run")
    llama, optimization = cli.model.model.config, cli.model.optimization
    shape = (llama.num_hidden_layers, llama.hidden_size, llama.intermediate_size)
    assert shape == (layers, hidden, ffn)
    assert (llama.num_attention_heads, llama.num_key_value_heads) == (heads, kv_heads)
    assert (optimization.lr, optimization.min_lr_ratio) == (lr, 0.1)
    assert (optimization.warmup_steps, optimization.max_grad_norm) == (500, 1.0)
    assert (optimization.betas, optimization.weight_decay) == ((0.9, 0.95), 0.1)
    assert (cli.datamodule.global_batch_size, cli.datamodule.seq_len) == (windows, 2048)
    assert abs(cli.trainer.max_steps - tokens / (windows * 2048)) < 1
    assert windows % (8 * cli.trainer.accumulate_grad_batches) == 0
    assert isinstance(cli.trainer.strategy, FullySharded)
    attention = 2 * hidden * hidden + 2 * hidden * kv_heads * hidden // heads
    block = attention + 3 * hidden * ffn + 2 * hidden
    parameters = layers * block + hidden + 2 * llama.vocab_size * hidden
    assert sum(p.numel() for p in cli.model.parameters()) == parameters
    assert all(p.is_meta for p in cli.model.parameters())  # nothing of that size was made


@pytest.mark.parametrize("size", STUDY)
def test_the_variants_differ_in_their_strategy_alone(size: str) -> None:
    ddp, fsdp2 = (
        load_yaml((LAUNCH / f"{size}-{name}.yaml").read_text()) for name in ("ddp", "fsdp2")
    )
    strategies = ddp["trainer"].pop("strategy"), fsdp2["trainer"].pop("strategy")
    assert strategies[0]["class_path"].endswith("DDPStrategy") and strategies[1] == "fsdp2"
    assert ddp == fsdp2
    shape = load_yaml((ROOT / "configs" / "model" / f"{size}.yaml").read_text())["model"]["llama"]
    assert fsdp2["model"]["llama"] == shape


@pytest.mark.slow
@pytest.mark.parametrize("size", STUDY)
def test_dry_run(size: str, tiny_data: Path, tmp_path: Path) -> None:
    """Two steps of two layers of its width, on fake tensors: no memory, every shape checked."""
    cli = built(size, tiny_data, tmp_path / "run", "--model.llama.num_hidden_layers", "2")
    module: Any = cli.model
    module.trainer = cli.trainer
    micro = cli.datamodule.global_batch_size // (8 * cli.trainer.accumulate_grad_batches)
    with FakeTensorMode(allow_non_fake_inputs=True), kernels.using("off"):
        module.model = module._convert(random_model(module.model.config, 0))
        optimizer = module.configure_optimizers()["optimizer"]
        ids = torch.zeros(micro, cli.datamodule.seq_len, dtype=torch.int64)
        batch = {"input_ids": ids, "labels": ids, "first_sample": torch.tensor(0)}
        for step in range(2):
            module._enter_step(step, batch)
            with cli.trainer.precision_plugin.forward_context():
                loss = token_losses(module.model, batch).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert loss.shape == ()
    assert not (tmp_path / "run").exists()


def test_every_file_has_its_command() -> None:
    named = re.findall(r"configs/launch/[\w.-]+", " ".join(COMMANDS))
    assert sorted(set(named)) == sorted(str(p.relative_to(ROOT)) for p in LAUNCH.glob("*.yaml"))


class ParsedOnly(RunCLI):
    def instantiate_classes(self) -> None:
        pass


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert ParsedOnly("fit", shlex.split(command)).config.model.policy.name
