"""Before several processes wait for each other, and when one of them is lost."""

import os
import re
import socket

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lowbit import Keep
from lowbit.bf16 import VARIABLE, Products, products
from train.distributed.fsdp import COMPUTE_DTYPES, FullySharded

_GONE = re.compile("Connection (closed|reset) by peer|timed out|Timed out|Broken pipe")


def check_strategy(trainer: Trainer, keep: Keep) -> None:
    """Raise ValueError for a strategy, precision or backend that is not there, or a port in use."""
    strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | FullySharded):
        name = type(strategy).__name__  # it would write checkpoints past our rules
        raise ValueError(
            f"trainer.strategy is {name}: expected auto (one device), ddp or fsdp2; tensor "
            "parallelism would cut the blocks of the formats apart"
        )
    precision = str(strategy.precision_plugin.precision)
    if isinstance(strategy, FullySharded) and precision not in COMPUTE_DTYPES:
        raise ValueError(
            f"trainer.precision={precision} with fsdp2: expected one of {[*COMPUTE_DTYPES]}"
        )
    if isinstance(strategy, FullySharded) and keep.quantized_weights:
        raise ValueError("model.keep.quantized_weights with fsdp2, which gathers weights anew")
    if isinstance(strategy, SingleDeviceStrategy):
        return
    if strategy.root_device.type == "cuda" and not torch.distributed.is_nccl_available():
        raise ValueError(
            "this PyTorch has no NCCL, through which GPUs talk: install a CUDA build of it, or "
            "train on one device (trainer.devices=1, trainer.strategy=auto)"
        )
    if on_first_rank() and not launcher_listens() and strategy.cluster_environment is not None:
        port = strategy.cluster_environment.main_port
        try:
            socket.create_server(("", port)).close()
        except OSError as error:
            raise ValueError(
                f"the rendezvous port {port} cannot be used ({error.strerror}): set MASTER_PORT to "
                "a free one"
            ) from None


def launcher_listens() -> bool:
    """Whether ranks meet at torchrun's own agent, which ends all when it has lost one."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def products_of_all(device: str) -> Products:
    """How all ranks multiply BF16 matrices; ValueError where they would differ."""
    own: Products = products(device)
    found: list[str] = [own]
    if torch.distributed.is_initialized():
        found *= torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, own)
    if len(set(found)) > 1:
        raise ValueError(
            f"ranks multiply BF16 matrices in different ways ({', '.join(found)}, by rank): set "
            f"{VARIABLE} to one of them on all machines"
        )
    return own


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone or does not answer."""
    return isinstance(error, torch.distributed.DistError) or bool(_GONE.search(str(error)))


def on_first_rank() -> bool:
    """Whether this is rank 0 of the job, from the environment: before any process group."""
    if "RANK" in os.environ:  # torchrun's
        return os.environ["RANK"] == "0"
    if "SLURM_PROCID" in os.environ and "LOCAL_RANK" not in os.environ:
        return os.environ["SLURM_PROCID"] == "0"
    return all(os.environ.get(name, "0") == "0" for name in ("NODE_RANK", "LOCAL_RANK"))
