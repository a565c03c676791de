"""A name, a flow mapping and a file are one format to every verb; nonsense is one line."""

import json
import signal
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lowbit.recipe import OPERANDS
from train.cli import main
from train.config.formats import check_formats, read_format
from train.config.layers import Layers
from train.config.policies import read_policy
from train.config.strict_yaml import load_yaml

Fit = Callable[..., int]
MAPPING = "{name: mxint8, block_size: 16, scale_rule: ceil}"
WRITTEN = {
    "name": "mxint5",
    "mapping": MAPPING,
    "element": "{element: {exponent_bits: 3, mantissa_bits: 2, max: 24}, scale: ue5m3}",
    "file": "name: own4\nelement: {bits: 4}\nscale: {exponent_bits: 4, mantissa_bits: 4}\n",
}
NONSENSE = {
    "unknown name": "mxint99",
    "unknown field": "{name: mxint8, blocks: 16}",
    "bits": "{element: {bits: 9}}",
    "max not representable": "{element: {exponent_bits: 3, mantissa_bits: 4, max: 15.3}}",
    "max beyond": "{element: {exponent_bits: 2, mantissa_bits: 1, max: 1000}}",
    "scale narrower than zero": "{name: mxint8, scale: {exponent_bits: 0, mantissa_bits: -3}}",
    "negative scale": "{name: mxint8, scale: {exponent_bits: -5, mantissa_bits: 3}}",
    "name clash": "{name: mxint8, element: {bits: 5}}",
    "no mapping": "{name: mxint8",
    "block of zero": "{name: mxint8, block_size: 0}",
    "text for a block": "{name: mxint8, block_size: many}",
    "text for bits": "{element: {bits: five}}",
    "a list": "{element: [5]}",
    "no file": "nowhere.yaml",
}


def argument(kind: str, folder: Path) -> str:
    if kind != "file":
        return WRITTEN[kind]
    (path := folder / "own4.yaml").write_text(WRITTEN[kind])
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 64)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, **heads, vocab_size=257, max_position_embeddings=128)
    LlamaForCausalLM(config).save_pretrained(folder / "tiny")
    (folder / "text.txt").write_text("".join(f"{i * i} is {i} squared.\n" for i in range(200)))
    return str(folder / "tiny"), str(folder / "text.txt")


def command(verb: str, written: list[str], model: tuple[str, str], out: Path) -> list[str]:
    texts = [model[0], "--text", model[1], "--tokenizer", "bytes", "--seq-len", "64"]
    return {
        "formats": ["formats", *written],
        "theory": ["theory", "--samples", "65536", "--out", str(out), "--formats", *written],
        "analyze": ["analyze", *texts, "--out", str(out), "--formats", *written],
        "eval": ["eval", *texts, "--out", str(out), "--formats", *written],
    }[verb]


@pytest.mark.parametrize("verb", ["formats", "theory", "analyze", "eval"])
def test_a_verb_takes_all_ways(
    verb: str, model: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = [argument(kind, tmp_path) for kind in WRITTEN]
    assert main(command(verb, written, model, tmp_path / "out")) == 0
    said = capsys.readouterr().out
    assert all(read_format(each).name in said for each in written)


@pytest.mark.parametrize("case", NONSENSE)
@pytest.mark.parametrize("key", ["recipe.fprop_input", "rules"])
def test_nonsense_in_a_policy_names_its_key(key: str, case: str) -> None:
    """As `fit` reads it, without the seconds of its parser."""
    rules = f"[{{pattern: '*', recipe: {{wgrad_input: {json.dumps(NONSENSE[case])}}}}}]"
    value = rules if key == "rules" else NONSENSE[case]
    with pytest.raises(
        ValueError, match=r"^(model\.policy\.(recipe|rules.0)|while parsing)"
    ) as told:
        check_formats(Layers.read([f"--model.policy.{key}", value]).plain)
    assert len(f"lowbit: error: {told.value}") <= 200 and "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("verb", "case"),
    [
        *(("formats", case) for case in NONSENSE),
        *product(("fit", "theory", "analyze", "eval"), ("unknown name", "max not representable")),
    ],
)
def test_nonsense_is_one_line(
    verb: str, case: str, model: tuple[str, str], tmp_path: Path, fit: Fit,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    if verb == "fit":
        code = fit(out, "mxint8", "--model.policy.recipe.fprop_input", NONSENSE[case])
    else:
        code = main(command(verb, [NONSENSE[case]], model, out))
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(lines) == 1 and len(lines[0]) <= 200, lines
    assert not out.exists()


def recipe_of(kind: str, folder: Path) -> Path:
    written = argument(kind, folder)
    (path := folder / "own.yaml").write_text(f"model: {{policy: {{name: own, recipe: {written}}}}}")
    return path


@pytest.mark.parametrize("kind", ["element", pytest.param("file", marks=pytest.mark.slow)])
def test_a_run_keeps_it_through_resume(
    kind: str, fit: Fit, tmp_path: Path, on_micro_batch: Callable[..., None],
    assert_same_run: Callable[..., None],
) -> None:  # fmt: skip
    """Equal in config.yaml and run.json, and the run that goes on is the run."""
    more = ("-c", str(recipe_of(kind, tmp_path)), "--checkpoint_every", "2")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert fit(whole, "bf16", *more) == 0
    on_micro_batch(3, lambda module: signal.raise_signal(signal.SIGTERM))
    assert fit(parts, "bf16", *more) == 143
    on_micro_batch(-1, lambda module: None)
    assert fit(parts, "bf16", *more) == 0
    assert_same_run(parts, whole)
    expected = read_format(argument(kind, tmp_path))
    for run in (whole, parts):
        policy = read_policy(load_yaml((run / "config.yaml").read_text())["model"]["policy"])
        assert {policy.recipe.format(operand) for operand in OPERANDS} == {expected}
        table = json.loads((run / "run.json").read_text())["recipe_table"]
        assert table and expected.name in json.dumps(table)


def test_nonsense_of_the_microscope_is_one_line(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path / "run", "bf16", "--diagnostics.formats", "[mxint8, mxint99]") == 2
    assert "error: diagnostics.formats.1: unknown block format 'mxint99'" in capsys.readouterr().err


def test_a_sweep_takes_it(
    fit: Fit, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In branches of a run, which this process trains."""
    assert fit(tmp_path / "run", "bf16", "--checkpoint_every", "3") == 0
    checkpoint, own = tmp_path / "run/checkpoints/step-00000003", recipe_of("mapping", tmp_path)
    place = ["--out", str(tmp_path / "out"), "--branch-from", str(checkpoint), "--horizon", "2"]
    both = ["--branches", "2", "--recipes", str(recipes / "bf16.yaml"), str(own)]
    assert main(["sweep", *place, *both]) == 0
    assert "own" in capsys.readouterr().out
