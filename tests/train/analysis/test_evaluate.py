"""`lowbit eval` against an independent computation of loss and divergence."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lowbit import QuantRecipe, ScaleFormat, ScaleRule, block_format, convert_linears
from train.analysis.scores import divergences, evaluate
from train.cli import main
from train.subjects.models import load_subject
from train.subjects.text import read_text


@pytest.fixture
def command(tiny_model: Path, text: Path, tmp_path: Path) -> list[str]:
    options = ["--tokenizer", "bytes", "--windows", "3", "--seq-len", "64"]
    return ["eval", str(tiny_model), "--text", str(text), *options, "--out", str(tmp_path / "out")]


def test_perplexity_and_kl_equal_an_independent_computation(
    command: list[str],
    tiny_model: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*command, "--formats", "mxint8", "mxfp4", "--weight-only"]) == 0
    rows = {r["format"]: r for r in json.loads((tmp_path / "out/eval.json").read_text())["rows"]}
    assert (rows["bf16"]["KL"], rows["bf16"]["top-25 KL"], rows["bf16"]["loss gap"]) == (0, 0, 0)
    ids = np.frombuffer(text.read_bytes() + b"\n", np.uint8)
    starts = np.linspace(0, len(ids) - 65, 5)[1:-1].astype(int)
    windows = torch.tensor(np.stack([ids[start : start + 65] for start in starts])).long()
    found = {}
    for name in ("bf16", "mxint8", "mxfp4"):
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        if name != "bf16":
            recipe = QuantRecipe(fprop_weight=block_format(name))
            convert_linears(model, recipe, ("lm_head",))
        with torch.no_grad():
            found[name] = model(windows[:, :-1]).logits.double().numpy()
    p = _softmax(found["bf16"])
    for name, logits in found.items():
        q = _softmax(logits)
        right = np.take_along_axis(q, windows[:, 1:, None].numpy(), -1)
        assert rows[name]["perplexity"] == pytest.approx(math.exp(-np.log(right).mean()), rel=1e-6)
        kl = (p * (np.log(p) - np.log(q))).sum(-1).mean()
        assert rows[name]["KL"] == pytest.approx(kl, rel=1e-4, abs=1e-12)
    assert 0 < rows["mxint8"]["KL"] < rows["mxfp4"]["KL"]
    printed = capsys.readouterr().out
    for word in ("3 windows x 64 tokens", "cast: weights of every linear layer", "KL(baseline"):
        assert word in printed


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_top_25_renormalises_over_the_baselines_tokens() -> None:
    p, q = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)).double()
    _, _, found = divergences(p.log_softmax(-1), q, torch.zeros(3, dtype=torch.int64))
    best = np.argsort(-p.numpy(), -1)[:, :25]
    a = _softmax(np.take_along_axis(p.numpy(), best, -1))
    b = _softmax(np.take_along_axis(q.numpy(), best, -1))
    assert found == pytest.approx((a * np.log(a / b)).sum(-1).mean(), rel=1e-12)


def test_windows_are_the_texts_own_tokens(tiny_model: Path, text: Path) -> None:
    args = argparse.Namespace(text=str(text), tokenizer="bytes", windows=2, seq_len=10, cache=None)
    found = read_text(load_subject(str(tiny_model), Path("unused")), args)
    assert found.inputs.shape == found.labels.shape == (2, 10)
    assert torch.equal(found.inputs[:, 1:], found.labels[:, :-1])
    for row in found.tokens:
        assert bytes(row.tolist()).decode() in text.read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--formats", "mxint9"], "unknown block format"),
        (["--formats", "int8", "--rotation", "block"], "int8 has no block size"),
        (["--formats", "mxint8", "--rotation", "7"], "rotation size=7"),
        (["--formats", "mxint8", "--skip", "nothing"], "'nothing' matches no linear layer"),
        (["--formats", "mxint8", "--windows", "9999"], "fewer than 9999 windows"),
        (["--formats", "mxint8", "--fewshot", "5"], "--fewshot 5 has no effect without --tasks"),
        (
            ["--formats", "mxint8", "--task-path", "t"],
            "--task-path t has no effect without --tasks",
        ),
    ],
)
def test_bad_input_is_one_line(
    command: list[str], more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *more]) == 2
    assert message in capsys.readouterr().err


def test_a_model_without_tokenizer_asks_for_one(
    tiny_model: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(tiny_model), "--formats", "mxint8", "--text", str(text)]) == 2
    assert "give --tokenizer" in capsys.readouterr().err


def test_tasks_need_the_harness(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([*command, "--formats", "mxint8", "--tasks", "piqa"]) == 2
    assert "--tasks needs the LM evaluation harness" in capsys.readouterr().err


@pytest.mark.slow
def test_smollm2_orders_the_formats(tmp_path_factory: pytest.TempPathFactory) -> None:
    """By KL: under one E8M0 convention as their QSNR does, and with two conventions otherwise.

    The second is that of an earlier measurement: integers with FP32 scales, floats by OCP's floor.
    """
    asked = argparse.Namespace(text="wiki", tokenizer=None, windows=3, seq_len=1024)
    asked.cache = tmp_path_factory.getbasetemp().parent / "wheels"
    subject = load_subject("smollm2", asked.cache)
    text = read_text(subject, asked)
    one = [block_format(name) for name in ("mxint8", "mxfp8", "mxint6", "nvfp4", "mxfp4")]
    exact = [block_format(n, scale=ScaleFormat.FP32, scale_rule=None) for n in ("mxint8", "mxint6")]
    floor = [block_format(n, scale_rule=ScaleRule.FLOOR) for n in ("mxfp8", "mxfp4")]
    two = [*exact, floor[0], block_format("nvfp4"), floor[1]]
    recipes = {repr(f): QuantRecipe(fprop_weight=f) for f in (*one, *two)}
    model = convert_linears(subject.model.to(torch.bfloat16), QuantRecipe(), ("lm_head",))
    scores = evaluate(model, {"bf16": QuantRecipe(), **recipes}, text)
    kl = {name: float(np.mean(score.kl)) for name, score in scores.items()}
    assert kl["bf16"] == 0
    for order in (one, two):
        assert sorted(order, key=lambda format: kl[repr(format)]) == order, kl


def other_model(kind: str, folder: Path) -> str:
    widths = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 320,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    gpt = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 320}
    own = {
        "gpt2": gpt,
        "openai-gpt": gpt,
        "mixtral": widths | {"num_local_experts": 4},
        "gpt_oss": widths | {"num_local_experts": 4, "head_dim": 16},
        "gpt_neox": widths,
    }
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **own[kind], bos_token_id=1, eos_token_id=2, pad_token_id=None)
    )
    model.save_pretrained(folder)
    return str(folder)


def calls(model: str, data: Path, out: Path) -> list[list[str]]:
    text = ["--formats", "mxint8", "--text", str(data), "--windows", "1", "--seq-len", "16"]
    return [["eval", model, *text], ["analyze", model, *text, "--out", str(out)]]


@pytest.mark.parametrize("kind", ["gpt2", "openai-gpt"])
def test_a_model_of_which_nothing_would_be_quantized_is_refused(
    kind: str, tmp_path: Path, tiny_data: Path, capsys: Any
) -> None:
    for call in calls(other_model(kind, tmp_path / "model"), tiny_data, tmp_path / "out"):
        capsys.readouterr()
        assert main(call) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "8 Conv1D" in line and "98,304 of" in line
    assert not (tmp_path / "out").exists()


def test_a_skip_of_all_layers_is_refused(tmp_path: Path, tiny_data: Path, capsys: Any) -> None:
    call = calls(other_model("gpt_neox", tmp_path / "model"), tiny_data, tmp_path / "out")[0]
    assert main([*call, "--skip", "*"]) == 2
    assert "less --skip ['*'], and the model's weights are in 9 Linear" in capsys.readouterr().err


LEFT = {
    "mixtral": "2 MixtralTopKRouter, 2 MixtralExperts",
    "gpt_oss": "2 GptOssTopKRouter, 2 GptOssExperts",
    "gpt_neox": None,
}


@pytest.mark.parametrize("kind", LEFT)
def test_what_of_a_model_stays_is_said(
    kind: str, tmp_path: Path, tiny_data: Path, capsys: Any
) -> None:
    call = calls(other_model(kind, tmp_path / "model"), tiny_data, tmp_path / "out")
    for verb, words in zip(call, ("not quantized: ", "not looked at: "), strict=True):
        assert main(verb) == 0
        (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith(words)]
        assert (LEFT[kind] or "1 Linear: 20,480 of") in line
