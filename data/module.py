"""The data of a run as a LightningDataModule: batches are a pure function of the optimizer step."""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.order import BatchOrder
from data.shards import Manifest, SplitName, TokenShards
from data.verify import verify

Batch = dict[str, Tensor]
ValChoice = Literal["spread", "first"]
CHUNK = 1 << 24  # tokens read at a time
IGNORED_LABEL = -100  # what the cross entropy of torch and transformers leaves out


@dataclass(frozen=True)
class Windows:
    """Windows of `seq_len` inputs and as many labels; each token is predicted by exactly one."""

    shards: TokenShards
    seq_len: int
    mask_eos: int | None = None  # where given, positions start again after this id

    def __len__(self) -> int:
        return max(len(self.shards) - 1, 0) // self.seq_len

    def documents(self, ids: NDArray[np.int64], eos_id: int) -> NDArray[np.int64]:
        """The number of the document in which each of the windows `ids` begins, from 0."""
        size = len(self.shards)
        parts = [
            np.flatnonzero(self.shards.read(start, min(start + CHUNK, size)) == eos_id) + start
            for start in range(0, size, CHUNK)
        ]
        return np.searchsorted(np.concatenate(parts), ids * self.seq_len)

    def batch(self, ids: NDArray[np.int64], first_sample: int) -> Batch:
        """The windows `ids`, in their order; an id of -1 is padding that no loss counts."""
        inputs = torch.zeros(len(ids), self.seq_len, dtype=torch.int64)
        labels = torch.full_like(inputs, IGNORED_LABEL)
        for row, window in enumerate(ids):
            if window >= 0:
                start = int(window) * self.seq_len
                tokens = self.shards.read(start, start + self.seq_len + 1)
                inputs.numpy()[row] = tokens[:-1]
                labels.numpy()[row] = tokens[1:]
        batch = {
            "input_ids": inputs,
            "labels": labels,
            "window": torch.from_numpy(ids),
            "first_sample": torch.tensor(first_sample),
        }
        if self.mask_eos is not None:
            batch["position_ids"] = document_positions(inputs, self.mask_eos)
        return batch


def spread(count: int, total: int) -> NDArray[np.int64]:
    """`count` of `total` indices, each from the middle of one of as many equal stretches."""
    return (2 * np.arange(count, dtype=np.int64) + 1) * total // (2 * count)


def document_positions(inputs: Tensor, eos_id: int) -> Tensor:
    """Positions counted from the start of each document, or of the window within one."""
    index = torch.arange(inputs.shape[1]).expand_as(inputs)
    starts = torch.zeros_like(inputs)
    starts[:, 1:] = torch.where(inputs[:, :-1] == eos_id, index[:, 1:], 0)
    return index - starts.cummax(dim=1).values


@dataclass(frozen=True)
class Share:
    """Which micro-batches of a global batch belong to one rank."""

    micro_batch_size: int
    rank: int
    world_size: int
    accumulate: int = 1

    def starts(self) -> list[int]:
        """The first samples of this rank's micro-batches, within the global batch."""
        micro_batches = range(self.rank, self.accumulate * self.world_size, self.world_size)
        return [index * self.micro_batch_size for index in micro_batches]


# Iterable datasets without a length: of any other kind Lightning replaces the sampler under DDP.
class TrainingBatches(IterableDataset[Batch]):
    """The micro-batches of one rank from optimizer step `first_step` on, without end."""

    def __init__(self, windows: Windows, order: BatchOrder, share: Share, first_step: int) -> None:
        self._windows = windows
        self._order = order
        self._share = share
        self._first_step = first_step

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        turn, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        micro_batches = itertools.count()
        for step in itertools.count(self._first_step):
            ids = self._order.windows(step)
            for start in self._share.starts():
                if next(micro_batches) % workers == turn:  # the loader asks its workers in turn
                    stop = start + self._share.micro_batch_size
                    yield self._windows.batch(ids[start:stop], start)


class ValidationBatches(IterableDataset[Batch]):
    """The windows `ids` in order, as many batches on each rank, the last padded."""

    def __init__(self, windows: Windows, ids: NDArray[np.int64], share: Share) -> None:
        self._windows = windows
        self._ids = ids
        self._share = share

    def __iter__(self) -> Iterator[Batch]:
        size = self._share.micro_batch_size
        for first in range(0, len(self._ids), size * self._share.world_size):
            start = first + self._share.rank * size
            own = self._ids[start : start + size]
            padding = np.full(size - len(own), -1)
            yield self._windows.batch(np.concatenate([own, padding]), start)


class TokenDataModule(LightningDataModule):
    """Prepared tokens in windows: the same global batches for any world size and accumulation."""

    def __init__(
        self,
        path: str,
        seq_len: int,
        global_batch_size: int,
        seed: int = 0,
        num_workers: int = 0,
        val_windows: int | None = None,
        val_choice: ValChoice = "spread",
        document_masking: bool = False,
    ) -> None:
        """Read the manifest; the shards are verified when training starts.

        Args:
            path: folder made by `lowbit prepare`.
            seq_len: tokens per window that the model sees.
            global_batch_size: windows per optimizer step, over all ranks and micro-batches.
            seed: of the order of the batches.
            num_workers: processes that read training batches; 0 reads in the training process.
            val_windows: validate on so many windows, by default on all.
            val_choice: which ones. spread: evenly over the whole split; first: its beginning, as
                runs that do not say so did.
            document_masking: add `position_ids` that start again with each document.
        """
        super().__init__()
        counts = {"seq_len": seq_len, "global_batch_size": global_batch_size}
        for name, count in (counts | {"val_windows": val_windows}).items():
            if count is not None and count < 1:
                raise ValueError(f"{name}={count}, expected at least 1")
        self.path = Path(os.path.expandvars(path)).expanduser()
        self.seq_len = seq_len
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.val_windows = val_windows
        self.val_choice = val_choice
        self.document_masking = document_masking
        self.manifest = Manifest.load(self.path)

    @property
    def fingerprint(self) -> str:
        """Of the data, as its manifest says."""
        return self.manifest.fingerprint

    @property
    def vocab_size(self) -> int:
        """Of the tokenizer."""
        return self.manifest.vocab_size

    def prepare_data(self) -> None:
        """Verify the files, once a machine."""
        verify(self.path, self.manifest)  # one process per machine; the others find its result

    def setup(self, stage: str | None = None) -> None:
        """Verify and open the shards; ValueError for too little data."""
        verify(self.path, self.manifest)
        self._train = self._windows("train")
        self._val = self._windows("val")
        if len(self._train) < self.global_batch_size:
            raise ValueError(
                f"{self.path} holds {len(self._train)} training windows of seq_len={self.seq_len}: "
                f"too few for one batch of global_batch_size={self.global_batch_size}"
            )
        wanted = 1 if self.val_windows is None else self.val_windows
        if (self.manifest.val.tokens or self.val_windows) and len(self._val) < wanted:
            raise ValueError(
                f"{self.path} holds {len(self._val)} validation windows of seq_len={self.seq_len}: "
                f"expected at least {wanted}"
            )

    def documents(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """In which documents of the validation split these of its windows begin."""
        return self._val.documents(ids, self.manifest.eos_id)

    def train_dataloader(self) -> DataLoader[Batch]:
        """From the trainer's step on, without end."""
        order = BatchOrder(
            len(self._train), self.global_batch_size, self.seed, self.manifest.fingerprint
        )
        batches = TrainingBatches(self._train, order, self._share(), self._attached().global_step)
        return self._loader(batches, self.num_workers)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """The chosen windows, padded to whole batches over the ranks."""
        num_windows = len(self._val) if self.val_windows is None else self.val_windows
        is_first = self.val_choice == "first"
        ids = np.arange(num_windows) if is_first else spread(num_windows, len(self._val))
        if not self.manifest.val.tokens:
            return []  # prepared without a validation split, which the manifest says
        return self._loader(ValidationBatches(self._val, ids, self._share()), 0)

    def _windows(self, split: SplitName) -> Windows:
        mask_eos = self.manifest.eos_id if self.document_masking else None
        return Windows(TokenShards(self.path, self.manifest, split), self.seq_len, mask_eos)

    def _share(self) -> Share:
        trainer = self._attached()
        ranks, accumulate = trainer.world_size, trainer.accumulate_grad_batches
        micro, rest = divmod(self.global_batch_size, ranks * accumulate)
        if rest:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not a multiple of "
                f"world_size={ranks} x accumulate_grad_batches={accumulate}"
            )
        return Share(micro, trainer.global_rank, ranks, accumulate)

    def _loader(self, batches: IterableDataset[Batch], num_workers: int) -> DataLoader[Batch]:
        cuda = self._attached().strategy.root_device.type == "cuda"
        return DataLoader(batches, batch_size=None, num_workers=num_workers, pin_memory=cuda)

    def _attached(self) -> Trainer:
        assert self.trainer is not None, "Lightning attaches the trainer before it asks for batches"
        return self.trainer
