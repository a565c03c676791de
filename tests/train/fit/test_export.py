"""hf/: what a run leaves is a model that others load, serve and trust."""

import importlib.util
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from data.prepare import PrepareRequest, prepare
from data.pretrained import load_vocabulary
from train.cli import main
from train.runs.run import read_run

Fit = Callable[..., int]
PROGRAM = Path(__file__).parents[1] / "plain_transformers.py"
SEQ_LEN, WINDOWS = 32, 4  # of the tiny configuration


def plain_transformers() -> Any:
    spec = importlib.util.spec_from_file_location("plain_transformers", PROGRAM)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


#: recipe, precision, and the column that computes as whoever loads the weights does
LOSSES = {
    "bf16, FP32": ("bf16", "32-true", "val/loss"),
    "mxint8, FP32": ("mxint8", "32-true", "val/loss_bf16"),
    "bf16, BF16": ("bf16", "bf16-mixed", "val/loss"),
}
LLAMA3 = (
    "{rope_type: llama3, rope_theta: 500000.0, factor: 8.0, low_freq_factor: 1.0,"
    " high_freq_factor: 4.0, original_max_position_embeddings: 32}"
)


@pytest.mark.parametrize("case", LOSSES)
def test_transformers_gives_the_validation_loss(
    case: str, fit: Fit, tmp_path: Path, tiny_data: Path, capsys: Any
) -> None:
    recipe, precision, column = LOSSES[case]
    options = ("--model.llama.rope_parameters", LLAMA3, "--trainer.precision", precision)
    assert fit(tmp_path / "run", recipe, "--model.validate_bf16", "true", *options) == 0
    expected = read_run(tmp_path / "run").metrics[column][-1]
    others, hf = plain_transformers(), tmp_path / "run" / "hf"
    shard = tiny_data / "val-00000.npy"
    found = others.validation_loss(hf, shard, SEQ_LEN, WINDOWS, precision)
    assert found == pytest.approx(expected, abs=1e-6)
    assert len(others.continuation(hf, "3 times 4 is")) > len("3 times 4 is")


@pytest.mark.slow
def test_transformers_alone_does(fit: Fit, tmp_path: Path, tiny_data: Path) -> None:
    """In a process that finds nothing of ours."""
    assert fit(tmp_path / "run", "bf16", "--trainer.precision", "32-true") == 0
    arguments = [tmp_path / "run" / "hf", tiny_data / "val-00000.npy", SEQ_LEN, WINDOWS, "32-true"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", str(PROGRAM), *map(str, arguments)],
        capture_output=True, text=True, cwd=tmp_path, env=environment, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    expected = read_run(tmp_path / "run").metrics["val/loss"][-1]
    assert found["ours"] == [] and found["text"].startswith("3 times 4 is")
    assert found["loss"] == pytest.approx(expected, abs=1e-6)


ROPES = {
    "theta": ("{rope_type: default, rope_theta: 500000.0}", None),
    "linear": ("{rope_type: linear, rope_theta: 7000.0, factor: 2.0}", "linear"),
    "llama3": (LLAMA3, "llama3"),
}


@pytest.mark.parametrize("case", ROPES)
def test_rope_stands_where_old_and_new_readers_look(case: str, fit: Fit, tmp_path: Path) -> None:
    given, kind = ROPES[case]
    steps = ("--trainer.max_steps", "1", "--model.llama.rope_parameters", given)
    assert fit(tmp_path / "run", "bf16", *steps) == 0
    plain = json.loads((tmp_path / "run" / "hf" / "config.json").read_text())
    wanted = json.loads((tmp_path / "run" / "run.json").read_text())["model"]["rope_parameters"]
    assert plain["rope_theta"] == wanted["rope_theta"]
    scaling = plain["rope_scaling"]
    assert (scaling and scaling["rope_type"]) == kind
    assert (scaling or {"rope_type": "default"}) | {"rope_theta": plain["rope_theta"]} == wanted
    assert AutoConfig.from_pretrained(tmp_path / "run" / "hf").rope_parameters == wanted
    assert plain["torch_dtype"] == plain["dtype"] == "float32"


@pytest.fixture
def with_template(tmp_path: Path) -> Path:
    """A corpus whose tokenizer puts a BOS before each text, and cuts it off at 5."""
    tokenizer = Tokenizer.from_str(load_vocabulary("bytes").json)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 257)]
    )
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "own.json"))
    for n in range(20):
        (tmp_path / f"{n}.txt").write_text(f"{n} is {n}, as everybody knows. " * 40)
    request = PrepareRequest(
        text=(f"{tmp_path}/*.txt",), tokenizer=str(tmp_path / "own.json"), eos="</s>",
        val_fraction=0.3,
    )  # fmt: skip
    prepare(tmp_path / "tokens", request)
    return tmp_path / "tokens"


def test_the_tokenizer_is_that_of_the_corpus(fit: Fit, tmp_path: Path, with_template: Path) -> None:
    run = tmp_path / "run"
    assert fit(run, "bf16", "--data.path", str(with_template), "--trainer.max_steps", "1") == 0
    tokenizer: Any = AutoTokenizer.from_pretrained(run / "hf")
    text = "12 is 12, and é"
    assert tokenizer(text).input_ids == load_vocabulary("bytes").encode(text).tolist()
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.convert_tokens_to_ids("</s>") == 258
    ends = GenerationConfig.from_pretrained(run / "hf")
    ids = (ends.eos_token_id, ends.bos_token_id, ends.pad_token_id)
    assert ids == (258, 258, 258)
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == ids
    config = AutoConfig.from_pretrained(run / "hf")
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (258, 258, None)
    assert "Losses" in (run / "hf" / "README.md").read_text()


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_are_as_readable_as_others(umask: int, fit: Fit, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        assert fit(tmp_path / "run", "bf16", "--trainer.max_steps", "1") == 0
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run" / "hf").iterdir()}
    assert modes == {0o666 & ~umask}


def test_the_card_says_what_the_run_was(fit: Fit, tmp_path: Path) -> None:
    phases = ("--model.policy.phases", "[{start: 0.5, gemms: [fprop]}]")
    assert fit(tmp_path / "run", "mxint8", *phases) == 0
    run, card = read_run(tmp_path / "run"), (tmp_path / "run" / "hf" / "README.md").read_text()
    for said in (
        run.info["data"]["fingerprint"], run.identity.hash, run.info["versions"]["torch"],
        repr(float(run.metrics["val/loss"][-1])), repr(float(run.metrics["train/loss"][-1])),
        "model.layers.0-1.mlp.{gate_proj,up_proj,down_proj} |" + " mxint8 |" * 6,
        "From step 4 on: fprop quantized.", "## Commands\n\n    lowbit",
    ):  # fmt: skip
        assert said in card, said
    assert "| nan" not in card


def test_an_export_starts_another_run(fit: Fit, tmp_path: Path) -> None:
    assert fit(tmp_path / "run", "bf16") == 0
    source = ("--model.init_from", str(tmp_path / "run" / "hf"))
    assert fit(tmp_path / "next", "mxint8", "--trainer.max_steps", "1", *source) == 0
    assert main(["compare", str(tmp_path / "next"), "--out", str(tmp_path / "c")]) == 0
