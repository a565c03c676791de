"""`lowbit plan`: memory, FLOPs and days of a workload, before a device is touched."""

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaForCausalLM

from train.fit.configuration import RunCLI
from train.model.architecture import check_positions
from train.model.flops import DEVICES, flops_per_token
from train.model.initial import check_source
from train.model.module import PretrainModule
from train.model.section import read_module
from train.model.step import mean_loss
from train.plan.live_bytes import LiveBytes

FP32 = 4  # bytes
STRATEGIES = ("auto", "ddp", "fsdp2")
CLASSES = {"DDPStrategy": "ddp", "FullySharded": "fsdp2"}


@dataclass(frozen=True)
class Memory:
    """Bytes on each device at the worst moment of a step."""

    weights: float
    gradients: float
    optimizer: float
    work: float  #: activations, logits and whatever else a step needs for a while

    @property
    def total(self) -> float:
        """All of it, bytes."""
        return self.weights + self.gradients + self.optimizer + self.work


@dataclass(frozen=True)
class Workload:
    """What the configuration says of devices, batches and steps."""

    strategy: str
    ranks: int
    accumulate: int
    micro_batch: int
    seq_len: int
    steps: int
    bucket_view: bool = False  #: DDP's: gradients are views of its buckets, no second copy

    @classmethod
    def read(cls, data: Any, trainer: Any) -> "Workload":
        """From the configuration's sections; ValueError for what does not divide."""
        strategy, batch = trainer["strategy"], data["global_batch_size"]
        arguments = {} if isinstance(strategy, str) else {**(strategy.get("init_args") or {})}
        if not isinstance(strategy, str):
            path = strategy["class_path"]
            strategy = CLASSES.get(path.rpartition(".")[2], path)
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
        steps, view = trainer["max_steps"], bool(arguments.get("gradient_as_bucket_view"))
        return cls(strategy, ranks, accumulate, micro, data["seq_len"], steps, view)

    @property
    def gradient_parts(self) -> int:
        """Into how many parts the gradients are cut; FSDP2 accumulates whole ones."""
        return self.ranks if self.strategy == "fsdp2" and self.accumulate == 1 else 1

    @property
    def tokens_per_step(self) -> int:
        """Over all devices and micro-batches."""
        return self.ranks * self.accumulate * self.micro_batch * self.seq_len


def traced_work(module: PretrainModule, workload: Workload, checkpointing: bool) -> int:
    """Peak bytes beyond the weights and the gradients of a micro-batch of a step.

    It runs on fake tensors, which have shapes and no data, in BF16 autocast. The gradients of the
    step before are there until the loss is; with accumulation there are gradients all the time.
    FSDP2 gathers linear weights in BF16 (see distributed/fsdp.py), no longer than it needs them.
    Recipes do not change the peak (`scripts/bench_step.py memory`), so none is traced.
    """
    sharded = workload.strategy == "fsdp2"
    with FakeTensorMode():
        model = LlamaForCausalLM(module.model.config)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if sharded and not module.compile_blocks:
            for linear in (m for m in model.modules() if isinstance(m, nn.Linear)):
                if linear.weight is not model.model.embed_tokens.weight:
                    shape = linear.weight.shape
                    linear.weight = nn.Parameter(torch.empty(shape, dtype=torch.bfloat16))
        weights = list(model.parameters())
        gradients = [torch.empty(w.numel() // workload.gradient_parts) for w in weights]
        ids = torch.zeros(workload.micro_batch, workload.seq_len, dtype=torch.long)

        def arrive(weight: torch.Tensor) -> None:
            """Into the gradients; FSDP2 reduces it from FP32, beside the gathered weight."""
            gathered = [torch.empty_like(weight), torch.empty(weight.shape)] if sharded else []
            del gathered
            weight.grad = None
            if workload.accumulate == 1:
                gradients.append(torch.empty(weight.numel() // workload.gradient_parts))

        for weight in weights:
            weight.register_post_accumulate_grad_hook(arrive)  # type: ignore[no-untyped-call]  # torch's
        with LiveBytes([*weights, *gradients]) as live:
            before = live.now
            with torch.autocast("cpu", torch.bfloat16):
                loss = mean_loss(model, {"input_ids": ids, "labels": ids})
            if workload.accumulate == 1:
                gradients.clear()
            loss.backward()  # type: ignore[no-untyped-call]  # torch's
        return int(live.peak - before)


def memory(module: PretrainModule, workload: Workload, checkpointing: bool) -> Memory:
    """What one device holds; FP32 weights and gradients, AdamW's two moments.

    DDP keeps a second copy of the gradients, its buckets, unless they are views of them. FSDP2
    divides all three by the ranks, but for the gradients that it accumulates.
    """
    model, sharded = module.model, workload.strategy == "fsdp2"
    whole = FP32 * sum(p.numel() for p in model.parameters())
    state = whole / (workload.ranks if sharded else 1)
    work = traced_work(module, workload, checkpointing)
    if sharded and model.config.tie_word_embeddings:  # FSDP2's root, gathered all the time
        work += FP32 * model.model.embed_tokens.weight.numel()
    work += FP32 * (module.teacher.num_parameters if module.teacher else 0)
    is_ddp = workload.strategy == "ddp" and workload.ranks > 1
    copies = 2 if is_ddp and not workload.bucket_view else 1
    return Memory(state, copies * whole / workload.gradient_parts, 2 * state, work)


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
    """Print what the run of this configuration needs; ValueError for one that none could begin."""
    cli = PlanCLI("plan", argv)
    workload = Workload.read(cli.config["data"], cli.config["trainer"])
    check_positions(workload.seq_len, cli.model.model.config.max_position_embeddings)
    if cli.model.init_from:
        check_source(cli.model.init_from, cli.model.model.config)
    device, utilisation = cli.config["device"], cli.config["utilisation"]
    if device not in DEVICES:
        raise ValueError(f"--device {device}: expected one of {', '.join(DEVICES)}")
    if not 0 < utilisation <= 1:
        raise ValueError(f"--utilisation {utilisation} is not above 0 and at most 1")
    flops = flops_per_token(cli.model.model, workload.seq_len)
    print("\n".join(_size(cli.model, workload, flops)))
    for checkpointing in (False, True):
        need, room = memory(cli.model, workload, checkpointing), DEVICES[device][1]
        print(_need(need, checkpointing) + ("" if need.total < room else f"; ABOVE {device}"))
    peak = DEVICES[device][0]
    seconds = (
        workload.steps * workload.tokens_per_step * flops / (workload.ranks * peak * utilisation)
    )
    print(
        f"time        {seconds / 86400:.3g} days on {workload.ranks} x {device} at "
        f"{utilisation:.0%} (assumed) of {peak / 1e12:.0f} TFLOP/s; a third more with checkpointing"
    )
    return 0


def _size(module: PretrainModule, workload: Workload, flops: float) -> list[str]:
    model = module.model
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    tokens = workload.steps * workload.tokens_per_step
    return [
        f"parameters  {sum(p.numel() for p in model.parameters()):,}, "
        f"{linear:,} of them in linear layers",
        f"step        {workload.tokens_per_step:,} tokens: {workload.ranks} devices x "
        f"{workload.accumulate} micro-batches x {workload.micro_batch} sequences x "
        f"{workload.seq_len}",
        f"run         {workload.steps:,} steps, {tokens / 1e9:.3g} B tokens",
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
