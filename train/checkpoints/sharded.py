"""Sharded checkpoints: a full one's state, its tensors in as many files as ranks.

    step-00000050/{state.ckpt, __0_0.distcp, __1_0.distcp, ..., .metadata, manifest.json}

The state's nesting is that of a full checkpoint, so either kind loads where the other was saved.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor

from train.checkpoints.distributed import METADATA, insert_tensors, take_tensors, write_tensors
from train.checkpoints.folder import (
    STATE,
    file_digest,
    load_state,
    open_staging,
    publish,
    write_state,
)

T = TypeVar("T")


def save_sharded(checkpoint: dict[str, Any], target: Path) -> None:
    """Write it whole or not at all; all ranks call it, and an OSError on one is raised on all."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    staging = target.with_name(target.name + ".tmp")
    tensors = take_tensors(checkpoint)

    def seal(files: dict[str, str]) -> None:
        files[STATE] = write_state(checkpoint, staging / STATE)
        publish(staging, target, files, checkpoint.get("origin", {}))

    try:
        _together(lambda: open_staging(target) if rank == 0 else None)
        write_tensors(tensors, staging)
        own = [*staging.glob(f"__{rank}_*"), *([staging / METADATA] if rank == 0 else [])]
        digests = _together(lambda: {path.name: file_digest(path) for path in own})
        files = {name: digest for part in digests for name, digest in part.items()}
        _together(lambda: seal(files) if rank == 0 else None)
    except OSError:
        if rank == 0:
            shutil.rmtree(staging, ignore_errors=True)  # a full disk needs the room
        raise


def load_sharded(
    path: Path, weights: Mapping[str, Tensor], optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Any]:
    """The state of a verified checkpoint of either kind, in shards like those of `weights`."""
    shards = {f"state_dict.{name}": value for name, value in weights.items()}
    for number, optimizer in enumerate(optimizers):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        shards |= {f"optimizer_states.{number}.{i}": p for i, p in enumerate(parameters)}

    def find(name: str, shape: torch.Size) -> Tensor | None:
        """The tensor that is sharded as this one is to be."""
        shard = shards.get(name if name in shards else name.rpartition(".")[0])
        return shard if shard is not None and shard.shape == shape else None

    def place(name: str, item: TensorStorageMetadata) -> Tensor | None:
        if name.startswith("optimizer_states") and not optimizers:
            return None  # a validation needs the weights alone
        shard = find(name, item.size)
        if shard is None:
            return torch.empty(item.size, dtype=item.properties.dtype)
        return torch.empty_like(shard.detach())

    state = load_state(path, place=place, mmap=True)
    tensors = take_tensors(state)
    for name, value in tensors.items():
        shard = find(name, value.shape)
        if isinstance(shard, DTensor) and not isinstance(value, DTensor):
            tensors[name] = _shard_like(shard, value)
    insert_tensors(state, tensors)
    return state


def _shard_like(shard: DTensor, whole: Tensor) -> Tensor:
    """Each rank takes its own part of what all have read, and lets go of the file."""
    own = distribute_tensor(whole, shard.device_mesh, shard.placements, src_data_rank=None)
    return own.clone()


def _together(act: Callable[[], T]) -> list[T]:
    """What `act` returns on each rank; OSError on all of them if it raised one on any."""
    result, failure = None, None
    try:
        result = act()
    except OSError as error:
        failure = str(error)
    outcomes: list[Any] = [(result, failure)]
    if dist.is_initialized():
        outcomes *= dist.get_world_size()
        dist.all_gather_object(outcomes, (result, failure))
    failures = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(outcomes) if text]
    if failures:
        raise OSError("; ".join(failures))
    return [value for value, _ in outcomes]
