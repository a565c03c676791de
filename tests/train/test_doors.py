"""What comes from outside: models, folders of others, readers that go away, options of no use."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from data.module import Windows
from data.shards import Manifest, TokenShards
from train.checkpoints.folder import complete_checkpoints, publish
from train.cli import main
from train.compare.overlay import check_overlay
from train.export.folder import check_target
from train.model.initial import check_source, pretrained_model
from train.ptq.work import already_done
from train.runs.folders import check_sweep_folder
from train.runs.run import read_run
from train.sweep.continuation import Continuation, build_module
from train.sweep.request import Variant
from train.sweep.units import BranchPoint

Fit = Callable[..., int]
WIDTHS: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 64,
}  # fmt: skip
OTHERS = (
    *("qwen2", "qwen3", "mistral", "olmo2", "gemma", "mixtral", "gpt2", "gpt_neox", "phi"),
    *("stablelm", "cohere", "smollm3", "granite"),
)
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**WIDTHS)).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize("kind", OTHERS)
def test_another_architecture_is_refused_by_name(
    kind: str, fit: Fit, tmp_path: Path, capsys: Any
) -> None:
    """Its configuration decides, before weights are read: those of a Llama lie beside it."""
    AutoConfig.for_model(kind, **WIDTHS).save_pretrained(tmp_path / "model")
    assert fit(tmp_path / "run", "bf16", "--model.init_from", str(tmp_path / "model")) == 2
    assert f"is a {kind} (" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_eval_and_analyze_of_another_model_still_load(kind: str) -> None:
    assert AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **WIDTHS))


FIELDS = {
    "rms_norm_eps": 1e-5, "hidden_act": "gelu", "attention_bias": True, "mlp_bias": True,
    "rope_parameters": LLAMA3, "max_position_embeddings": 128, "head_dim": 32,
    "tie_word_embeddings": True, "num_hidden_layers": 1,
}  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_a_llama_is_taken_as_it_is_or_refused_field_by_field(field: str, tmp_path: Path) -> None:
    config = LlamaConfig(**WIDTHS | {field: FIELDS[field]})
    torch.manual_seed(0)
    witness = LlamaForCausalLM(config).eval()
    witness.save_pretrained(tmp_path)
    ids = torch.arange(32)[None]
    with torch.no_grad():
        found = pretrained_model(str(tmp_path), config).eval()(ids).logits
        assert torch.equal(found, witness(ids).logits)
    with pytest.raises(ValueError, match=f"has .*{field}=.*model.llama says .*{field}="):
        pretrained_model(str(tmp_path), LlamaConfig(**WIDTHS))


OF_OTHERS = {
    "sliding_window": 16, "logits_scaling": 8.0, "qk_norm": True, "rope_interleaved": True,
    "embedding_multiplier": 12.0, "auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"},
}  # fmt: skip


@pytest.mark.parametrize("field", OF_OTHERS)
def test_a_field_that_no_llama_heeds_is_refused(field: str, llama: Path) -> None:
    """It was something else that computed with it; what is only said is no hindrance."""
    plain = json.loads((llama / "config.json").read_text())
    said = {"_name_or_path": "x", "tokenizer_class": "y", "unsloth_version": "1", "is_llama": True}
    (llama / "config.json").write_text(json.dumps(plain | said | {"sliding_window": None}))
    check_source(str(llama), LlamaConfig(**WIDTHS))
    (llama / "config.json").write_text(json.dumps(plain | {field: OF_OTHERS[field]}))
    with pytest.raises(ValueError, match=f"has {field}=.*of which a Llama knows nothing"):
        check_source(str(llama), LlamaConfig(**WIDTHS))


@pytest.mark.slow
def test_init_from_is_one_model_under_every_strategy_and_in_branches(
    ranks: tuple[Path, Any], tiny_data: Path, recipes: Path
) -> None:
    """Rope, eps and activation are not the defaults; the witness is plain transformers."""
    folder, results = ranks
    strategies = ("auto", "ddp", "fsdp2")
    assert [results[f"init_from, {s}"]["codes"] for s in strategies] == [[0], [0, 0], [0, 0]]
    runs = [read_run(folder / f"init-{strategy}") for strategy in strategies]
    manifest, ids = Manifest.load(tiny_data), results["init_from, auto"]["windows"]["0"]
    windows = Windows(TokenShards(tiny_data, manifest, "train"), 32, None)
    batch = windows.batch(np.array(ids), 0)

    def loss(**changes: Any) -> float:
        config = LlamaConfig.from_pretrained(folder / "source", **changes)
        model = LlamaForCausalLM.from_pretrained(folder / "source", config=config).eval()
        with torch.no_grad():
            logits = model(batch["input_ids"]).logits
        return float(F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()))

    right = loss()
    for run in runs:
        assert run.metrics["train/loss"][0] == pytest.approx(right, abs=1e-5)
        assert run.metrics["train/loss"][1] == pytest.approx(runs[0].metrics["train/loss"][1], 1e-5)
    default: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
    for change in ({"rms_norm_eps": 1e-6}, {"hidden_act": "silu"}, {"rope_parameters": default}):
        assert abs(loss(**change) - right) > 1e-4  # each of them would be seen
    point = BranchPoint.read(folder / "init-auto" / "checkpoints" / "step-00000001")
    variant = Variant("bf16", "", recipes / "bf16.yaml", {})
    module, judge = build_module(point.config, variant), build_module(point.config, variant)
    found = Continuation(point.path, point.config, seed=0, horizon=1).run(module, judge)
    assert found is not None and found.loss == runs[0].val_curve[1][-1]
    assert module.step_loss == runs[0].metrics["train/loss"][1]


@pytest.mark.parametrize("fault", ["missing", "unexpected", "mismatched"])
def test_every_tensor_is_used_and_every_parameter_filled(fault: str, llama: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    match fault:
        case "missing":
            del weights[name]
        case "unexpected":
            name = "model.layers.1.mlp.up_proj.bias"
            weights[name] = torch.ones(128)
        case "mismatched":
            weights[name] = weights[name][:64].clone()
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{fault} tensors .*{name}"):
        pretrained_model(str(llama), LlamaConfig(**WIDTHS))


def test_a_run_goes_on_though_its_source_is_gone(
    fit: Fit, tmp_path: Path, llama: Path, capsys: Any, assert_same_run: Callable[..., None]
) -> None:
    options = ("--model.init_from", str(llama), "--model.optimization.warmup_steps", "0")
    options += ("--checkpoint_every", "3")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert fit(whole, "mxint8", *options) == 0
    shutil.copytree(whole, parts)
    for path in complete_checkpoints(parts / "checkpoints")[1:]:
        shutil.rmtree(path)
    shutil.rmtree(llama)
    assert fit(parts, "mxint8", *options) == 0
    assert_same_run(parts, whole)
    assert fit(tmp_path / "new", "mxint8", *options) == 2  # but none begins
    assert not (tmp_path / "new").exists()


WITHOUT_USE = {
    "bf16-true": (("--trainer.precision", "bf16-true"), "trainer.precision=bf16-true: expected"),
    "64-true": (("--trainer.precision", "64-true"), "trainer.precision=64-true: expected"),
    "16-mixed": (("--trainer.precision", "16-mixed"), "trainer.precision=16-mixed: expected"),
    "pad": (("--model.llama.pad_token_id", "3"), "pad_token_id=3 would keep"),
    "pad of 0": (("--model.llama.pad_token_id", "0"), "pad_token_id=0 would keep"),
    "positions": (("--model.llama.max_position_embeddings", "16"), "data.seq_len=32 exceeds"),
    "one too few": (("--model.llama.max_position_embeddings", "31"), "data.seq_len=32 exceeds"),
}


@pytest.mark.parametrize("case", WITHOUT_USE)
def test_what_would_be_another_run_without_a_word(
    case: str, fit: Fit, tmp_path: Path, capsys: Any
) -> None:
    arguments, message = WITHOUT_USE[case]
    assert fit(tmp_path / "run", "bf16", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --- folders of others ------------------------------------------------------------------------

FOREIGN = {
    "a model": ["config.yaml", "hf/model.safetensors"],
    "a table": ["metrics.csv"],
    "a lock": ["lock", "notes.txt"],
    "a record": ["run.json"],
    "results by name": ["compare.json", "branches.json", "eval.json"],
    "an empty lock": ["lock", "config.yaml"],
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("case", FOREIGN)
@pytest.mark.parametrize("verb", ["fit", "theory", "sweep"])
def test_a_folder_of_others_is_not_touched(
    verb: str, case: str, fit: Fit, tmp_path: Path, recipes: Path, tiny: Path, capsys: Any
) -> None:
    folder = tmp_path / "mine"
    for name in FOREIGN[case]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("" if case == "an empty lock" else '{"mine": 1}')
    if verb == "theory" and case == "a record":
        (folder / "run.json").rename(folder / "record.json")
    before = contents(folder)
    sweep = ["sweep", "--out", str(folder), "-c", str(tiny), "--recipes", f"{recipes}/bf16.yaml"]
    match verb:
        case "fit":
            assert fit(folder, "bf16") == 2
        case "theory":
            assert main(["theory", "--out", str(folder)]) == 2
        case "sweep":
            assert main(sweep) == 2
    assert f"{folder} holds other files" in capsys.readouterr().err
    assert contents(folder) == before


def test_an_export_of_others_stays(fit: Fit, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    assert fit(run, "bf16", "--trainer.max_steps", "1") == 0
    (run / "hf" / "notes.txt").write_text("mine")
    assert fit(run, "bf16", "--trainer.max_steps", "2") == 2
    assert "hf holds notes.txt, which is not ours" in capsys.readouterr().err
    assert (run / "hf" / "notes.txt").read_text() == "mine"
    check_sweep_folder(tmp_path)  # which holds a run


def test_what_lies_beside_ours_is_not_replaced(tmp_path: Path) -> None:
    """In a place whose earlier content would be: an export's folder, compare's TensorBoard."""
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "model.gguf").write_text("of ours")
    export, overlay = tmp_path / "export", tmp_path / "compare"
    publish(tmp_path / "s", export, {"model.gguf": "0"}, {"layout": "gguf"})
    check_target(export)
    (overlay / "tensorboard" / "mean").mkdir(parents=True)
    (overlay / "tensorboard" / "mean" / "events.out.tfevents.1").touch()
    check_overlay(overlay)
    for folder, check in ((export, check_target), (overlay, check_overlay)):
        (folder / "tensorboard").mkdir(exist_ok=True)
        (folder / "tensorboard" / "notes.txt").write_text("mine")
        with pytest.raises(FileExistsError, match=r"tensorboard"):
            check(folder)
    quantized = tmp_path / "q"
    quantized.mkdir()
    (quantized / "quantization.json").write_text("{}")
    with pytest.raises(FileExistsError, match="another quantized model"):
        already_done(quantized, {"method": 1})


# --- exit codes -------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, 129), (signal.SIGXCPU, 152)])
def test_sighup_and_sigxcpu_save(
    number: int, code: int, fit: Fit, tmp_path: Path, on_micro_batch: Callable[..., None]
) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # of whoever runs the tests under nohup
    try:
        on_micro_batch(2, lambda module: os.kill(os.getpid(), number))
        assert fit(tmp_path / "run", "bf16") == code
    finally:
        signal.signal(number, before)
    assert [p.name[-1] for p in complete_checkpoints(tmp_path / "run" / "checkpoints")] == ["3"]


def test_nohup_is_heeded(fit: Fit, tmp_path: Path, on_micro_batch: Callable[..., None]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        on_micro_batch(2, lambda module: os.kill(os.getpid(), signal.SIGHUP))
        assert fit(tmp_path / "run", "bf16") == 0
    finally:
        signal.signal(signal.SIGHUP, before)


WRITES = """
import sys
from train.output.lasting import lasting_streams
with lasting_streams():
    for index in range(2000):
        print("x" * 100, flush=True)
        print("y" * 100, file=sys.stderr)
open("done", "w").close()
sys.exit(7)
"""


@pytest.mark.parametrize("stream", ["stdout", "stderr", "both"])
@pytest.mark.parametrize("fault", ["reader gone", "full"])
def test_what_nobody_reads_ends_nothing(stream: str, fault: str, tmp_path: Path) -> None:
    out, into = os.pipe()
    os.close(out)
    target = into if fault == "reader gone" else os.open("/dev/full", os.O_WRONLY)
    streams = {name: target if stream in (name, "both") else subprocess.DEVNULL
               for name in ("stdout", "stderr")}  # fmt: skip
    ended = subprocess.run([sys.executable, "-P", "-c", WRITES], cwd=tmp_path, **streams)  # type: ignore[call-overload]
    assert ended.returncode == 7 and (tmp_path / "done").exists()


@pytest.mark.slow
def test_a_run_goes_on_without_its_reader(
    tmp_path: Path, tiny: Path, recipes: Path, tiny_data: Path
) -> None:
    layers = f"-c {tiny} -c {recipes}/bf16.yaml --data.path {tiny_data} --run_dir run"
    command = f"{sys.executable} -P -m train.cli fit {layers} 2>&1 | head -c 100"
    subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=tmp_path, check=True)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
