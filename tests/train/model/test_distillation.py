"""Distillation: the loss against float64, the teacher in resumes, pairs and refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from train.compare.pairing import check_pairing
from train.model.distillation import Distillation, Teacher
from train.runs.identity import Identity
from train.runs.record import read_config, read_record
from train.runs.run import read_runs

Fit = Callable[..., int]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320,
         "max_position_embeddings": 64}  # fmt: skip


@pytest.fixture
def make_teacher(tmp_path: Path) -> Callable[..., Path]:
    """Random weights whose predictions differ, in a folder of transformers' own."""

    def make(name: str = "teacher", seed: int = 5, **changes: Any) -> Path:
        torch.manual_seed(seed)
        config = LlamaConfig(**SIZES | {"initializer_range": 0.2} | changes)
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def distilled(teacher: Path, ce: float = 0.0) -> tuple[str, ...]:
    return ("--model.distill_from.teacher", str(teacher),
            "--model.distill_from.cross_entropy", str(ce))  # fmt: skip


@pytest.mark.parametrize("ce", [0.0, 0.5])
def test_loss_and_gradient_are_those_of_float64(
    ce: float, make_teacher: Callable[..., Path]
) -> None:
    """Witness: the sum over the vocabulary as it is written down, positions without label left."""
    folder = make_teacher()
    torch.manual_seed(1)
    student = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.2)).eval()
    ids, labels = torch.randint(320, (2, 9)), torch.randint(320, (2, 9))
    labels[0, :3] = -100
    teacher = Teacher(Distillation(str(folder), ce), 320)
    loss = teacher.loss(student, {"input_ids": ids, "labels": labels})
    loss.backward()  # type: ignore[no-untyped-call]
    found = student.lm_head.weight.grad.clone()
    student.zero_grad()
    plain = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        p = plain(ids).logits.double().softmax(-1)
    q = student(ids).logits.double().log_softmax(-1)
    each = (p * (p.log() - q)).sum(-1) + ce * F.nll_loss(
        q.flatten(0, 1), labels.flatten(), reduction="none"
    ).view_as(labels)
    expected = each[labels != -100].mean()
    expected.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found, student.lm_head.weight.grad, rtol=1e-4, atol=1e-7)


def test_a_model_learns_nothing_from_itself(
    fit: Fit, make_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    """Without quantization and dropout; under a recipe the same start has a loss."""
    teacher, losses = make_teacher(), {}
    start = ("--model.init_from", str(teacher), "--model.llama.attention_dropout", "0",
             "--trainer.max_steps", "1")  # fmt: skip
    for recipe in ("bf16", "mxint8"):
        assert fit(tmp_path / recipe, recipe, *start, *distilled(teacher)) == 0
        lines = (tmp_path / recipe / "metrics.csv").read_text().splitlines()
        losses[recipe] = float(lines[1].split(",")[lines[0].split(",").index("train/loss")])
    assert losses["bf16"] == 0.0 < losses["mxint8"]


def test_resumed_bitwise_and_with_no_other_teacher(
    fit: Fit,
    make_teacher: Callable[..., Path],
    tmp_path: Path,
    on_micro_batch: Callable[..., None],
    assert_same_run: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    import signal

    flags = (*distilled(make_teacher(), 0.5), "--checkpoint_every", "1")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert fit(whole, "mxint8", *flags) == 0
    on_micro_batch(3, lambda _: signal.raise_signal(signal.SIGTERM))
    assert fit(parts, "mxint8", *flags) == 143
    on_micro_batch(-1, lambda _: None)
    other = make_teacher("other", seed=6)
    for changed in (distilled(other, 0.5), distilled(Path(flags[1]), 0.25), ()):
        assert fit(parts, "mxint8", *changed, "--checkpoint_every", "1") == 2
        assert "the configuration differs" in capsys.readouterr().err
    Path(flags[1]).rename(tmp_path / "moved")  # the same weights elsewhere
    assert fit(parts, "mxint8", *distilled(tmp_path / "moved", 0.5), *flags[-2:]) == 0
    assert_same_run(parts, whole)


def test_runs_of_another_teacher_are_no_pair(
    fit: Fit, make_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    """Nor is one without, also where its record is from before there were teachers."""
    teachers = {"a": make_teacher(), "b": make_teacher("b", seed=6)}
    out, short = (
        tmp_path / "runs",
        ("--trainer.max_steps", "2", "--trainer.val_check_interval", "2"),
    )
    assert fit(out / "bf16", "bf16", *short, *distilled(teachers["a"])) == 0
    assert fit(out / "mxint8", "mxint8", *short, *distilled(teachers["a"])) == 0
    a, b = read_runs([out])
    check_pairing([a, b])
    for name, options in (("b", distilled(teachers["b"])), ("none", ())):
        assert fit(out / name, "mxint8", *short, *options) == 0
    found = {run.path.name: run for run in read_runs([out])}
    for name in ("b", "none"):
        with pytest.raises(ValueError, match=r"teacher_weights|distill_from"):
            check_pairing([found["bf16"], found[name]])
    record = read_record(out / "none")
    config = read_config(out / "none")
    config["model"].pop("distill_from")
    for key in ("identity", "teacher_weights"):
        record.pop(key)
    (out / "none" / "run.json").write_text(json.dumps(record))
    (out / "none" / "config.yaml").write_text(json.dumps(config))
    older = {run.path.name: run for run in read_runs([out])}["none"]
    assert isinstance(older.identity, Identity)
    with pytest.raises(ValueError, match=r"teacher_weights|distill_from"):
        check_pairing([found["bf16"], older])


@pytest.mark.parametrize("kind", ["vocabulary", "missing", "negative", "quantized", "tensor"])
def test_bad_teachers_are_refused_in_one_line(
    kind: str,
    fit: Fit,
    make_teacher: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from safetensors.torch import load_file, save_file

    folder, ce, expected = make_teacher(), 0.0, "model.distill_from.teacher="
    match kind:
        case "vocabulary":
            folder, expected = make_teacher("wide", vocab_size=321), "has vocab_size=321"
        case "missing":
            folder, expected = tmp_path / "nowhere", "no such folder"
        case "negative":
            ce, expected = -1.0, "cross_entropy=-1.0: expected 0 or more"
        case "quantized":
            config = json.loads((folder / "config.json").read_text())
            config["quantization_config"] = {"quant_method": "fp8"}
            (folder / "config.json").write_text(json.dumps(config))
            expected = "holds quantized weights"
        case "tensor":
            held = load_file(folder / "model.safetensors")
            held.pop("model.norm.weight")
            save_file(held, folder / "model.safetensors", {"format": "pt"})
            expected = "missing tensors model.norm.weight"
    capsys.readouterr()
    assert fit(tmp_path / "run", "bf16", *distilled(folder, ce)) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert expected in last and len(last) <= 300
    assert not (tmp_path / "run").exists()
