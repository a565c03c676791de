"""A run's weights, finished or from a checkpoint, are what the analysing verbs look at."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from data.shards import Manifest
from train.cli import main
from train.subjects.models import load_subject


def test_a_run_and_its_checkpoint_are_the_same_weights(
    fit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert fit(run, "bf16") == 0
    finished = load_subject(str(run), tmp_path)
    last = max((run / "checkpoints").iterdir(), key=lambda path: path.name)
    saved = load_subject(str(last), tmp_path)
    witness = LlamaForCausalLM.from_pretrained(run / "hf", dtype=torch.float32).state_dict()
    for subject in (finished, saved):
        state = subject.model.state_dict()
        assert state.keys() == witness.keys()
        assert all(torch.equal(state[name], witness[name]) for name in state)
        assert subject.vocabulary is not None and subject.vocabulary.size == 257
    shutil.rmtree(run / "hf")
    assert load_subject(str(run), tmp_path).source == str(last)
    assert finished.data is not None
    assert main(["eval", str(run), "--formats", "mxint8", "--windows", "2", "--seq-len", "32"]) == 0
    assert f"val split of {finished.data}" in capsys.readouterr().out
    assert Manifest.load(finished.data).fingerprint


def test_what_is_not_a_model_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = str(tmp_path / "absent")
    assert main(["eval", absent, "--formats", "mxint8"]) == 2
    assert f"no such model: {absent}" in capsys.readouterr().err
