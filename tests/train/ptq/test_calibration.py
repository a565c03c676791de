"""What `lowbit quantize` calibrates on: conversations in the model's own template, or nothing."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.vocabulary import byte_vocabulary
from train.cli import main
from train.ptq.calibration import SEED
from train.quantized.layout import DOCUMENT

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}|{% endfor %}"
ROWS = [(f"What is {i} squared?", f"It is {i * i}, and {i} cubed is {i**3}.") for i in range(60)]
CHAT = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in ROWS]  # fmt: skip
SHARE_GPT = [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
             for q, a in ROWS]  # fmt: skip
PLAIN = [{"text": f"[user]{q}|[assistant]{a}|"} for q, a in ROWS]


@pytest.fixture
def with_template(make_model: Callable[..., Path]) -> Path:
    """A model with a tokenizer of bytes and a chat template."""
    folder = make_model(num_hidden_layers=1)
    vocabulary = byte_vocabulary()
    (folder / "tokenizer.json").write_text(vocabulary.json)
    end = vocabulary.tokenizer.id_to_token(vocabulary.eos_id)
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def _written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("rows", [CHAT, SHARE_GPT, PLAIN], ids=["messages", "sharegpt", "text"])
def test_a_dataset_is_rendered_by_the_models_template(
    rows: list[dict[str, Any]], with_template: Path, tmp_path: Path
) -> None:
    """Witness: the template's text written out, as bytes, in the order that SEED draws."""
    data, out = _written(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    flags = ["--format", "mxfp4", "--dataset", data, "--windows", "3", "--seq-len", "48"]
    assert main(["quantize", str(with_template), str(out), *flags]) == 0
    said = json.loads((out / DOCUMENT).read_text())["method"]["calibration"]
    order = np.random.default_rng(SEED).permutation(len(ROWS))
    text = "".join("[user]{}|[assistant]{}|".format(*ROWS[i]) for i in order)
    ids = byte_vocabulary().tokenizer.encode(text, add_special_tokens=False).ids
    expected = torch.tensor(ids[: 3 * 49]).view(3, 49)[:, :-1].contiguous()
    assert said["sha256"] == hashlib.sha256(expected.numpy().tobytes()).hexdigest()
    assert said["text"].startswith(f"dataset {data} (train), ") and said["tokens"] == 144


DATA = "rows.jsonl"
REFUSED = [
    (["--method", "rtn", "--observer", "minmax", "--windows", "4"], "--windows 4 has no effect"),
    (["--method", "rtn", "--observer", "minmax", "--seq-len", "64"], "--seq-len 64 has no effect"),
    (["--method", "rtn", "--tokenizer", "bytes"], "--tokenizer bytes has no effect"),
    (["--dataset-split", "test"], "--dataset-split test has no effect without --dataset"),
    (["--text", "wiki", "--dataset", DATA], "give one of them"),
    (["--dataset", DATA, "--windows", "4000"], "fewer than 4000 windows"),
    (["--dataset", DATA, "--windows", "0"], "both at least 1"),
    (["--dataset", "./nowhere"], "dataset ./nowhere cannot be read"),
    (["--dataset", "odd.jsonl"], "has columns question: expected messages or text"),
    (["--dataset", "broken.jsonl"], "is no conversation"),
]


@pytest.mark.parametrize(("flags", "said"), REFUSED)
def test_refused_in_one_line(
    flags: list[str],
    said: str,
    with_template: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    _written(tmp_path / DATA, CHAT)
    _written(tmp_path / "odd.jsonl", [{"question": "?"}])
    _written(tmp_path / "broken.jsonl", [{"messages": [{"content": "?"}]}])
    capsys.readouterr()
    assert main(["quantize", str(with_template), "out", "--format", "mxfp4", *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error and len(error) < 300
    assert not list(tmp_path.glob("out*"))


def test_without_a_template_conversations_are_refused(
    with_template: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (with_template / "chat_template.jinja").unlink()
    flags = ["--format", "mxfp4", "--dataset", _written(tmp_path / DATA, CHAT)]
    assert main(["quantize", str(with_template), str(tmp_path / "out"), *flags]) == 2
    assert "has no chat template: give --text" in capsys.readouterr().err
