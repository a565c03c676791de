"""OUT.partial: finished blocks, from which a killed quantization goes on with the same bytes."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.durable import sync_folder, write_durably
from train.checkpoints.folder import file_digest
from train.ptq.solve import Found
from train.quantized.layout import DOCUMENT, StoredLayer, is_ours, stored_layer
from train.quantized.tensors import Entry, entries_of, read_tensors, write_tensors
from train.runs.lock import RunLock


class Work:
    """The parts of one request, a folder beside OUT that is there from the first finished block."""

    def __init__(self, out: Path, request: Mapping[str, Any]) -> None:
        self.folder = out.with_name(out.name + ".partial")
        self._request = json.dumps(request, sort_keys=True, indent=1)
        self._lock = RunLock(self.folder)
        path = self.folder / "request.json"
        if path.exists() and path.read_text() != self._request:
            raise FileExistsError(
                f"{self.folder} holds blocks of another quantization: finish that with the command "
                "that began it, or remove the folder"
            )
        if self.folder.exists() and not path.exists() and any(self.folder.iterdir()):
            raise FileExistsError(f"{self.folder} is not ours: move it away")
        if self.folder.exists():
            self._lock.acquire()

    def __enter__(self) -> "Work":
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def finished(self, index: int) -> dict[str, dict[str, Any]] | None:
        """What is said of the layers of a block; None where it is not finished."""
        tensors, said = self._paths(index)
        if not said.exists():
            return None
        found: dict[str, Any] = json.loads(said.read_text())
        if not tensors.exists() or file_digest(tensors) != found["sha256"]:
            return None
        layers: dict[str, dict[str, Any]] = found["layers"]
        return layers

    def finish(self, index: int, found: Mapping[str, Found]) -> dict[str, dict[str, Any]]:
        """Keep a block, on disk when it returns; what is said of its layers."""
        if not self._lock.held:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            write_durably(self.folder / "request.json", self._request)
        layers = {name: describe(one) for name, one in found.items()}
        tensors, said = self._paths(index)
        entries = [entry for name, one in found.items() for entry in one.layer.entries(name)]
        staging = self.folder / "tmp"
        staging.mkdir(exist_ok=True)
        (digest,) = write_tensors(staging, entries).values()
        (staging / "model.safetensors").replace(tensors)
        sync_folder(self.folder)
        text = json.dumps({"sha256": digest, "layers": layers}, indent=1)
        write_durably(said, text)
        return layers

    def layers(self, index: int) -> dict[str, StoredLayer]:
        """Those of a finished block, to compute with."""
        tensors, _ = self._paths(index)
        held, known = read_tensors(tensors), self.finished(index)
        assert known is not None
        return {name: stored_layer(name, said, held) for name, said in known.items()}

    def entries(self, index: int) -> list[Entry]:
        """The tensors of a finished block."""
        return list(entries_of(self._paths(index)[0]))

    def remove(self) -> None:
        """It is not needed any more."""
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def _paths(self, index: int) -> tuple[Path, Path]:
        stem = self.folder / f"block-{index:05d}"
        return stem.with_suffix(".safetensors"), stem.with_suffix(".json")


def describe(found: Found) -> dict[str, Any]:
    """What `layers` of quantization.json says of a layer."""
    said = found.layer.describe() | {"error": found.error}
    known = {"damping": found.damping, "input_amax": found.input_amax}
    return said | {name: value for name, value in known.items() if value is not None}


def already_done(out: Path, request: Mapping[str, Any]) -> bool:
    """Whether OUT is what this request leaves. FileExistsError for a folder that holds else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not out.is_dir() or not is_ours(out):
        raise FileExistsError(f"{out} holds other files: expected a new or empty folder")
    known = json.loads((out / DOCUMENT).read_text())
    if {key: known.get(key) for key in request} != json.loads(json.dumps(request)):
        raise FileExistsError(f"{out} holds another quantized model: choose a new folder")
    return True
