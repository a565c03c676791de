"""Step time and peak of live tensor bytes of recipes against BF16: `python scripts/bench_step.py`.

Time: a step is forward, backward, clipping and AdamW of `lowbit fit`'s model in BF16 autocast. The
recipes, of which one may name its backend (mxint8:integer), take turns; the ratio printed is the
median over rounds of a step over that round's BF16 step. `fp32` among them is the BF16 step without
autocast. LOWBIT_KERNELS=off times the plain PyTorch definition. As a CPU with AVX2 alone:

    LOWBIT_BF16=fp32 LOWBIT_MARCH=x86-64-v3 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 \\
        MKL_ENABLE_INSTRUCTIONS=AVX2 python scripts/bench_step.py time --model quickstart \\
        --recipes fp32 mxint8 mxfp8 --threads 2

Memory: tensor bytes alive at the worst moment of a step, counted by a dispatch mode as operators
return and storages die; weights, gradients and optimizer state included, an operator's own scratch
space is not.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from timing import machine, seconds
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lowbit import Backend, Emulate, Randomness, Reuse, bf16, convert_linears, kernels
from lowbit.integer import Integer
from lowbit.kernels.cpu.memory import keep_freed_memory
from train.config.policies import read_policy
from train.model.optimizer import adamw
from train.model.step import Optimization, clip_gradients, mean_loss, total_norm
from train.plan.live_bytes import LiveBytes

CONFIGS = Path(__file__).parents[1] / "configs"
BACKENDS: dict[str, type[Backend]] = {"": Emulate, "integer": Integer}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# name -> shape, sequences, their length
MODELS: dict[str, tuple[dict[str, Any], int, int]] = {
    "22m": (
        dict(
            hidden_size=512, num_hidden_layers=6, intermediate_size=1408, num_attention_heads=8,
            num_key_value_heads=4, vocab_size=4096,
        ),
        *(4, 512),
    ),
}  # fmt: skip


class Trainee:
    """A model under a recipe, ready for steps on one batch."""

    def __init__(self, model: str, recipe: str, device: torch.device) -> None:
        shape, batch, length = _shape(model)
        torch.manual_seed(0)
        self.device, self.reuse = device, Reuse()
        self.model = LlamaForCausalLM(LlamaConfig(**shape, use_cache=False))
        nn.Module.to(self.model, device)
        self.autocast = recipe != "fp32"
        name, _, backend = (recipe if self.autocast else "bf16").partition(":")
        policy = read_policy(_yaml("recipe", name)["model"]["policy"])
        convert_linears(self.model, policy, randomness=Randomness(0), backend=BACKENDS[backend]())
        self.optimizer = adamw(self.model.parameters(), Optimization(lr=1e-4))
        ids = torch.randint(0, shape["vocab_size"], (batch, length + 1)).to(device)
        self.batch = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}

    def step(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, self.autocast), self.reuse:
            loss = mean_loss(self.model, self.batch)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        parameters = list(self.model.parameters())
        clip_gradients(parameters, 1.0, total_norm(parameters))
        self.optimizer.step()

    def seconds(self, clock: Callable[[], float]) -> float:
        return seconds(self.step, self.device, clock)

    def peak_bytes(self) -> int:
        self.step()  # the optimizer's state exists from now on
        state = (v for s in self.optimizer.state.values() for v in s.values())
        self.optimizer.zero_grad()
        with LiveBytes(x for x in (*self.model.parameters(), *state)) as live:
            self.step()
        return int(live.peak)


def _yaml(kind: str, name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CONFIGS / kind / f"{name}.yaml").read_text())
    return loaded


def _shape(model: str) -> tuple[dict[str, Any], int, int]:
    """Of a name in MODELS, or of a file in configs/model/, which may end in `:<sequences>`."""
    if model in MODELS:
        return MODELS[model]
    name, _, sequences = model.partition(":")
    config = _yaml("model", name)
    data = config["data"]
    return config["model"]["llama"], int(sequences or data["global_batch_size"]), data["seq_len"]


def bench_time(
    model: str, recipes: list[str], rounds: int, clock: Callable[[], float], device: torch.device
) -> None:
    """Print the paired median of each recipe's step time."""
    trainees = {name: Trainee(model, name, device) for name in ("bf16", *recipes)}
    for trainee in trainees.values():
        trainee.step()
    times: dict[str, list[float]] = {name: [] for name in trainees}
    for index in range(rounds):
        order = list(trainees) if index % 2 == 0 else list(reversed(trainees))
        for name in order:
            times[name].append(trainees[name].seconds(clock))
    base = times["bf16"]
    for name, own in times.items():
        ratios = sorted(a / b for a, b in zip(own, base, strict=True))
        quartiles = f"{ratios[len(ratios) // 4]:.2f}-{ratios[3 * len(ratios) // 4]:.2f}"
        print(
            f"{model}  {name:28} {statistics.median(own):.4f} s/step, "
            f"{statistics.median(ratios):.3f} x bf16 (quartiles {quartiles}, {rounds} rounds)"
        )
    if "fp32" in times:
        ratio = statistics.median(a / b for a, b in zip(base, times["fp32"], strict=True))
        print(f"{model}  bf16 takes {ratio:.3f} x the same step in FP32")


def bench_memory(model: str, recipes: list[str], device: torch.device) -> None:
    """Print the peak of live tensor bytes of each recipe's step."""
    base = 0
    for name in ("bf16", *recipes):
        peak = Trainee(model, name, device).peak_bytes()
        base = base or peak
        print(f"{model}  {name:28} {peak / 2**20:.1f} MiB at the peak, {peak / base:.4f} x bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=["time", "memory"])
    parser.add_argument(
        "--model",
        default="22m",
        help="22m, or a file in configs/model/, as 145m:1 with one sequence",
    )
    parser.add_argument("--recipes", nargs="+", help="default: mxint8, on CPUs also mxint8:integer")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: of all threads, for a busy machine"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu, or cuda")
    args = parser.parse_args()
    integer = args.device.type == "cpu" and kernels.enabled()
    recipes = args.recipes or ["mxint8", *(["mxint8:integer"] if integer else [])]
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as `lowbit fit` does on CPUs
    print(machine(args.device))
    with bf16.everywhere():
        if args.what == "time":
            bench_time(args.model, recipes, args.rounds, CLOCKS[args.clock], args.device)
        else:
            bench_memory(args.model, recipes, args.device)


if __name__ == "__main__":
    main()
