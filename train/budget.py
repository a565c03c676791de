"""`lowbit plan`: memory, FLOPs and days of a launch, before a device is touched."""

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaForCausalLM

from train.configuration import RunCLI, read_module
from train.flops import DEVICES, flops_per_token
from train.live_bytes import LiveBytes
from train.module import PretrainModule, token_losses

FP32, BF16 = 4, 2  # bytes
STRATEGIES = ("auto", "ddp", "fsdp2")


@dataclass(frozen=True)
class Memory:
    """Bytes on each device at the worst moment of a step."""

    weights: float
    gradients: float
    optimizer: float
    work: float  #: activations, logits and whatever else a step needs for a while

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.work


def traced_peak(
    module: PretrainModule, micro_batch: int, seq_len: int, checkpointing: bool, sharded: bool
) -> int:
    """Peak bytes beyond the weights, of one micro-batch's forward and backward.

    A step of the model runs on fake tensors, which have shapes and no data, in BF16 autocast; a
    gradient that is accumulated leaves where the gradients are `sharded`. Recipes do not change the
    peak (`scripts/bench_step.py memory`), so none is traced.
    """
    with FakeTensorMode():
        model = LlamaForCausalLM(module.model.config)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        weights = list(model.parameters())
        for weight in weights if sharded else ():
            weight.register_post_accumulate_grad_hook(_forget_gradient)  # type: ignore[no-untyped-call]  # torch's
        ids = torch.zeros(micro_batch, seq_len, dtype=torch.long)
        with LiveBytes(weights) as live:
            before = live.now
            with torch.autocast("cpu", torch.bfloat16):
                loss = token_losses(model, {"input_ids": ids, "labels": ids}).sum() / ids.numel()
            loss.backward()  # type: ignore[no-untyped-call]  # torch's
        return int(live.peak - before)


def _forget_gradient(weight: torch.Tensor) -> None:
    weight.grad = None


@dataclass(frozen=True)
class Launch:
    """What the configuration says of devices, batches and steps."""

    strategy: str
    ranks: int
    accumulate: int
    micro_batch: int
    seq_len: int
    steps: int

    @classmethod
    def read(cls, data: Any, trainer: Any) -> "Launch":
        strategy, batch = trainer["strategy"], data["global_batch_size"]
        if strategy not in STRATEGIES:
            raise ValueError(f"trainer.strategy={strategy}: expected one of {STRATEGIES}")
        devices, accumulate = trainer["devices"], trainer["accumulate_grad_batches"]
        if isinstance(devices, list):
            devices = len(devices)
        ranks = (1 if devices in ("auto", -1) else int(devices)) * trainer["num_nodes"]
        micro, rest = divmod(batch, ranks * accumulate)
        if rest or not micro:
            raise ValueError(
                f"data.global_batch_size={batch} is not a multiple of {ranks} devices x "
                f"trainer.accumulate_grad_batches={accumulate}"
            )
        return cls(strategy, ranks, accumulate, micro, data["seq_len"], trainer["max_steps"])

    @property
    def tokens_per_step(self) -> int:
        return self.ranks * self.accumulate * self.micro_batch * self.seq_len


def memory(module: PretrainModule, launch: Launch, checkpointing: bool) -> Memory:
    """What one device holds; FP32 weights and gradients, AdamW's two moments.

    DDP keeps a second copy of the gradients, its buckets. FSDP2 divides all three by the ranks,
    needs two gathered blocks in BF16 (one is computed, the next one arrives), and frees the BF16
    weights that one device keeps for the backward pass.
    """
    model, sharded = module.model, launch.strategy == "fsdp2"
    parameters = FP32 * sum(p.numel() for p in model.parameters())
    peak = traced_peak(module, launch.micro_batch, launch.seq_len, checkpointing, sharded)
    work = float(peak if sharded else max(0, peak - parameters))  # whole gradients are in the peak
    if sharded:
        block = BF16 * sum(p.numel() for p in model.model.layers[0].parameters())
        kept = 0 if checkpointing else block * len(model.model.layers)
        work += 2 * block - kept
    state = parameters / (launch.ranks if sharded else 1)
    copies = 2 if launch.strategy == "ddp" and launch.ranks > 1 else 1
    return Memory(state, copies * state, 2 * state, work)


class PlanCLI(RunCLI):
    """The configuration of `lowbit fit` and a device to run it on."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Beside the run's own."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--device", type=str, default="h100", help=f"One of {', '.join(DEVICES)}."
        )
        parser.add_argument(
            "--utilisation",
            type=float,
            default=0.4,
            help="Assumed share of the device's BF16 peak; 0.3 to 0.5 is usual for BF16. Formats "
            "that are emulated on a GPU are slower: measure a few steps.",
        )

    def instantiate_classes(self) -> None:
        """The model alone, without weights: neither devices nor data need be here."""
        self.model = read_module(self.plain_config()["model"])


def plan(argv: list[str]) -> int:
    """Print what the run of this configuration needs."""
    cli = PlanCLI("plan", argv)
    launch = Launch.read(cli.config["data"], cli.config["trainer"])
    device, utilisation = cli.config["device"], cli.config["utilisation"]
    if device not in DEVICES:
        raise ValueError(f"--device {device}: expected one of {', '.join(DEVICES)}")
    if not 0 < utilisation <= 1:
        raise ValueError(f"--utilisation {utilisation} is not above 0 and at most 1")
    flops = flops_per_token(cli.model.model, launch.seq_len)
    print("\n".join(_size(cli.model, launch, flops)))
    for checkpointing in (False, True):
        need, room = memory(cli.model, launch, checkpointing), DEVICES[device][1]
        print(_need(need, checkpointing) + ("" if need.total < room else f"; ABOVE {device}"))
    peak = DEVICES[device][0]
    seconds = launch.steps * launch.tokens_per_step * flops / (launch.ranks * peak * utilisation)
    print(
        f"time        {seconds / 86400:.3g} days on {launch.ranks} x {device} at {utilisation:.0%} "
        f"(assumed) of {peak / 1e12:.0f} TFLOP/s; a third more with checkpointing"
    )
    return 0


def _size(module: PretrainModule, launch: Launch, flops: float) -> list[str]:
    model = module.model
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    tokens = launch.steps * launch.tokens_per_step
    return [
        f"parameters  {sum(p.numel() for p in model.parameters()):,}, "
        f"{linear:,} of them in linear layers",
        f"step        {launch.tokens_per_step:,} tokens: {launch.ranks} devices x "
        f"{launch.accumulate} micro-batches x {launch.micro_batch} sequences x {launch.seq_len}",
        f"run         {launch.steps:,} steps, {tokens / 1e9:.3g} B tokens",
        f"FLOPs       {flops:.4g} a token, {tokens * flops:.3g} in all",
    ]


def _need(need: Memory, checkpointing: bool) -> str:
    parts = {"weights": need.weights, "gradients": need.gradients, "optimizer": need.optimizer}
    parts["activations and work"] = need.work
    return (
        f"memory      {need.total / 1e9:.3g} GB a device, checkpointing "
        f"{'on ' if checkpointing else 'off'}: "
        + ", ".join(f"{name} {size / 1e9:.3g}" for name, size in parts.items())
    )
