"""Tensors in torch.distributed.checkpoint's files: `__<rank>_0.distcp`, and their index.

The index, `.metadata`, is a pickle: read with a few plain classes allowed, never by `pickle.load`.
"""

import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

METADATA = ".metadata"
_HERE = "torch.distributed.checkpoint"
_PLAIN = {
    *((f"{_HERE}.metadata", name) for name in (
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
    (f"{_HERE}.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout"),
    ("torch", "Size"), ("torch", "float32"), ("torch", "float64"), ("torch", "int64"),
}  # fmt: skip

Like = Callable[[str, TensorStorageMetadata], Tensor | None]


def take_tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """Remove weights and optimizer tensors from `state`; they are returned by name."""
    weights, state["state_dict"] = state["state_dict"], {}
    taken = {f"state_dict.{name}": value for name, value in weights.items()}
    for number, optimizer in enumerate(state.get("optimizer_states", [])):
        for index, values in optimizer["state"].items():
            taken |= {f"optimizer_states.{number}.{index}.{n}": v for n, v in values.items()}
        optimizer["state"] = {}
    return taken


def insert_tensors(state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Undo `take_tensors`."""
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "state_dict":
            state["state_dict"][rest] = value
        else:
            number, index, field = rest.split(".")
            optimizer = state["optimizer_states"][int(number)]
            optimizer["state"].setdefault(int(index), {})[field] = value


def write_tensors(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Every rank its shards, synced to disk; OSError on all ranks if it fails on one."""
    try:
        with _no_advice():
            save(dict(tensors), storage_writer=_Writer(folder), no_dist=not dist.is_initialized())
    except CheckpointException as error:  # no Exception, and torch's writer hides the OSError
        (rank, (cause, _)), *_ = error.failures.items()
        raise OSError(f"rank {rank}: {cause}") from None


def read_tensors(folder: Path, like: Like) -> dict[str, Tensor]:
    """The tensors that `like`, given name and description, has a place for: DTensor or whole.

    Each rank reads what it needs, whatever the number of ranks that wrote. ValueError for an index
    that holds more than plain data, or that reaches out of the folder.
    """
    metadata = _read_metadata(folder / METADATA)
    wanted: dict[str, Any] = {}
    for name, item in metadata.state_dict_metadata.items():
        assert isinstance(item, TensorStorageMetadata)
        if (place := like(name, item)) is not None:
            wanted[name] = place
    with _no_advice():
        load(dict(wanted), storage_reader=_Reader(folder, metadata), no_dist=True)
    return wanted


class _Writer(FileSystemWriter):
    def storage_meta(self) -> None:
        """Nothing: it would keep the path of the machine that wrote."""


class _Reader(FileSystemReader):
    """With an index that has been read, so that the base class unpickles none."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PLAIN:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def _read_metadata(path: Path) -> Metadata:
    try:
        with path.open("rb") as file:
            metadata: Metadata = _PlainUnpickler(file).load()
        tensors = metadata.state_dict_metadata.values()
        names = {info.relative_path for info in metadata.storage_data.values()}
    except Exception as error:  # whatever a forged pickle makes of these classes
        raise ValueError(f"{path} holds more than plain data: {error}") from None
    if not all(isinstance(item, TensorStorageMetadata) for item in tensors):
        raise ValueError(f"{path} names something else than tensors")  # torch would unpickle it
    if any(Path(name).name != name for name in names):
        raise ValueError(f"{path} names files outside its folder: {sorted(names)}")
    return metadata


@contextmanager
def _no_advice() -> Iterator[None]:
    with warnings.catch_warnings():  # that it takes this for a single process, which is asked for
        warnings.filterwarnings("ignore", ".*torch.distributed is disabled.*")
        yield
