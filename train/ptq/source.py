"""The model that is quantized: its tensors where they lie, and the files that go with it."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from data.pretrained import ask_hub_once, load_vocabulary
from data.vocabulary import Vocabulary
from train.checkpoints.folder import file_digest
from train.model.initial import weights_hash
from train.quantized.layout import is_ours
from train.quantized.tensors import Entry, entries_of
from train.subjects.models import Subject, load_subject

_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_FILES = re.compile(
    r"(generation_|tokenizer_|special_tokens_|added_)?(config|map|tokens)\.json|tokenizer\.(json|model)"
    r"|vocab\.json|merges\.txt|chat_template\.(jinja|json)"
)


@dataclass(frozen=True)
class Source:
    """A causal language model by its tensors; floats of any width, none of them quantized yet."""

    name: str  #: for a person
    config: PretrainedConfig
    entries: Mapping[str, Entry]  #: all tensors, by the names that transformers has for them
    held: Mapping[str, Any]  #: name -> the tensor, or the file that it lies in
    files: Mapping[str, bytes]  #: configuration, tokenizer, what else goes with the weights
    sha256: str  #: of the weights
    subject: Subject  #: what texts ask: vocabulary, own data (its model is not the source's)

    def tensor(self, name: str) -> Tensor:
        """As it is stored."""
        held = self.held[name]
        if isinstance(held, Tensor):
            return held
        with safe_open(held, framework="pt") as file:
            found: Tensor = file.get_tensor(name)
            return found


def open_source(name: str, cache: Path) -> Source:
    """MODEL: a folder or a hub id of safetensors is read as needed, all others are loaded whole."""
    path = Path(name).expanduser()
    if is_ours(path):
        raise ValueError(f"{name} is quantized already: quantize the model that it was made from")
    in_memory = name == "smollm2" or path.suffix == ".gguf" or _is_run(path)
    if in_memory:
        return _from_subject(load_subject(name, cache))
    if not path.exists() and name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no such model: {name}")
    return _from_folder(path if path.exists() else _fetched(name), name)


def _is_run(path: Path) -> bool:
    return (path / "run.json").exists() or (path.parent.parent / "run.json").exists()


def _from_subject(subject: Subject) -> Source:
    model: Any = subject.model
    held = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        held.pop("lm_head.weight", None)
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    files = {"config.json": json.dumps(config, indent=2).encode()}
    if (vocabulary := subject.vocabulary) is not None:
        end = vocabulary.tokenizer.id_to_token(vocabulary.eos_id)
        kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
        files["tokenizer.json"] = vocabulary.json.encode()
        files["tokenizer_config.json"] = json.dumps(kind).encode()
        if subject.chat_template:
            files["chat_template.jinja"] = subject.chat_template.encode()
    entries = {key: Entry.of(key, tensor) for key, tensor in held.items()}
    return Source(subject.source, model.config, entries, held, files, weights_hash(model), subject)


def _from_folder(folder: Path, name: str) -> Source:
    paths = sorted(path for path in folder.glob("*.safetensors") if _WEIGHTS.fullmatch(path.name))
    if not paths or not (folder / "config.json").is_file():
        raise ValueError(f"{name} holds no model.safetensors with a config.json")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{name}: its config.json cannot be read: {_line(error)}") from None
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{name} holds quantized weights: expected floating point")
    entries, held, digest = dict[str, Entry](), dict[str, Path](), hashlib.sha256()
    for path in paths:
        digest.update(file_digest(path).encode())
        for entry in entries_of(path):
            entries[entry.name], held[entry.name] = entry, path
    files = {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if _FILES.fullmatch(p.name)}
    return Source(name, config, entries, held, files, digest.hexdigest(), _subject(folder, name))


def _subject(folder: Path, name: str) -> Subject:
    vocabulary: Vocabulary | None
    try:
        vocabulary = load_vocabulary(str(folder))
    except ValueError:
        vocabulary = None
    return Subject(torch.nn.Identity(), vocabulary, name)


def _fetched(name: str) -> Path:
    """The snapshot of a hub id; ValueError in one line for any of the hub's refusals."""
    from huggingface_hub import snapshot_download

    ask_hub_once()
    wanted = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:
        raise ValueError(f"model {name} cannot be fetched: {_line(error)}") from None


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:140]
