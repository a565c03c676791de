"""The plan's figures against counts by torch, and against a real step."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from lowbit import LayerPolicy
from train.cli import main
from train.model.flops import device_peak, flops_per_token
from train.model.initial import empty_model
from train.model.module import PretrainModule
from train.model.section import read_module
from train.model.step import token_losses
from train.plan import plan as budget
from train.plan.live_bytes import LiveBytes
from train.plan.plan import Workload, memory

CONFIGS = Path(__file__).parents[3] / "configs"


def _config(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((CONFIGS / "model" / f"{name}.yaml").read_text())
    return config


def _llama(name: str, **changes: int) -> LlamaConfig:
    return LlamaConfig(**_config(name)["model"]["llama"] | changes)


def _model(name: str) -> LlamaForCausalLM:
    return empty_model(_llama(name))


@pytest.mark.parametrize("name", ["quickstart", "145m"])
def test_flops_are_those_that_torch_counts(name: str) -> None:
    seq_len = _config(name)["data"]["seq_len"]
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        model = LlamaForCausalLM(_llama(name, num_hidden_layers=3))
        model.set_attn_implementation("eager")  # torch does not count the fused one for CPUs
        ids = torch.zeros(1, seq_len, dtype=torch.long)
        token_losses(model, {"input_ids": ids, "labels": ids}).sum().backward()
    assert counter.get_total_flops() == pytest.approx(
        seq_len * flops_per_token(model, seq_len), rel=0.02
    )


def test_live_bytes_see_storages_once_and_die_with_them() -> None:
    x = torch.zeros(256)
    with LiveBytes([x]) as live:
        y = x + 1
        view = y.view(2, 128)
        assert live.now == 2048
        del y, view
    assert (live.now, live.peak) == (1024, 2048)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_is_that_of_a_real_step(checkpointing: bool) -> None:
    """Weights, gradients, AdamW and activations of three of quickstart's blocks: within 10 %."""
    llama = _llama("quickstart", num_hidden_layers=3)
    model = LlamaForCausalLM(llama)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.zeros(2, 256, dtype=torch.long)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = token_losses(model, {"input_ids": ids, "labels": ids}).mean()
        optimizer.zero_grad()  # where Lightning has it: the last gradients outlive the forward pass
        loss.backward()
        optimizer.step()

    step()
    moments = [v for state in optimizer.state.values() for v in state.values()]
    with LiveBytes([*model.parameters(), *(p.grad for p in model.parameters()), *moments]) as live:
        step()
    module = PretrainModule(llama, LayerPolicy("bf16"))
    need = memory(module, Workload("auto", 1, 1, 2, 256, 10), checkpointing)
    assert need.total == pytest.approx(live.peak, rel=0.1)


@pytest.mark.slow
def test_memory_of_fsdp2_is_what_the_plan_says(ranks: tuple[Path, Any]) -> None:
    """Within 10 % of what malloc gave out in a step, beside weights, gradients and moments."""
    folder, results = ranks
    assert results["memory"]["codes"] == [0, 0]
    config = yaml.safe_load((folder / "memory.yaml").read_text())
    module = read_module({"llama": config["model"]["llama"], "policy": config["model"]["policy"]})
    state = 16 * sum(p.numel() for p in module.parameters()) / 2  # a rank's; FP32
    measured = state + int((folder / "memory.bytes").read_text())
    planned = memory(module, Workload("fsdp2", 2, 1, 4, 128, 3), checkpointing=True).total
    print(f"planned {planned:.0f} bytes, measured {measured:.0f}")
    assert planned == pytest.approx(measured, rel=0.1)


def test_strategies_share_what_they_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "traced_work", lambda *_: 0)  # tested above
    module = PretrainModule(_model("quickstart").config, LayerPolicy("bf16"))
    one, ddp, fsdp = (
        memory(module, Workload(strategy, ranks, 1, 1, 64, 10), True)
        for strategy, ranks in (("auto", 1), ("ddp", 8), ("fsdp2", 8))
    )
    view = memory(module, Workload("ddp", 8, 1, 1, 64, 10, bucket_view=True), True)
    assert view.gradients == one.gradients
    assert ddp.gradients == 2 * one.gradients and ddp.optimizer == one.optimizer
    assert 8 * fsdp.weights == one.weights and 8 * fsdp.optimizer == one.optimizer


def test_the_verb_counts_the_parameters_of_3b(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "traced_work", lambda *_: 0)  # tested above
    arguments = ["-c", str(CONFIGS / "model/3b.yaml"), "-c", str(CONFIGS / "recipe/mxint8.yaml")]
    arguments += ["--trainer.devices", "512", "--trainer.strategy", "fsdp2"]
    assert main(["plan", *arguments, "--device", "h200"]) == 0
    parameters = sum(p.numel() for p in _model("3b").parameters())
    out = capsys.readouterr().out
    assert f"parameters  {parameters:,}," in out and "days on 512 x h200" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "h1000"], "--device h1000"),
        (["--utilisation", "2"], "--utilisation 2"),
        (["--trainer.devices", "3"], "not a multiple of 3 devices"),
        (["--trainer.strategy", "deepspeed"], "trainer.strategy=deepspeed"),
        (["--data.seq_len", "4096"], "data.seq_len=4096 exceeds model.llama.max_position_emb"),
        (["--model.init_from", "nowhere/model"], "init_from=nowhere/model cannot be read"),
    ],
)
def test_bad_plans_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["-c", str(CONFIGS / "model/quickstart.yaml"), "-c", str(CONFIGS / "recipe/bf16.yaml")]
    assert main(["plan", *files, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_devices_are_known_by_their_own_names() -> None:
    assert device_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert device_peak("NVIDIA A100-SXM4-40GB") == 312e12
    assert device_peak("Intel(R) Xeon(R) Processor") is None
