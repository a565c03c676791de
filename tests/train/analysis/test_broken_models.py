"""Models of others that are broken, or cannot be looked at: one line that names them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    OPTConfig,
    OPTForCausalLM,
)

from train.cli import main
from train.export.subject import load_judged
from train.model.initial import pretrained_model
from train.subjects.models import load_subject

WEIGHT = "model.layers.0.mlp.up_proj.weight"
SIZES = {
    "vocab_size": 257, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
Break = Callable[[Path], Any]


class Evil:
    def __reduce__(self) -> Any:
        return Path("EVIL").write_text, ("it ran",)


def bytes_of_weights(change: Callable[[bytes], bytes]) -> Break:
    def broken(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return broken


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Break:
    def broken(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors", {"format": "pt"})

    return broken


def pickled(content: Any) -> Break:
    def broken(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        if isinstance(content, bytes):
            (folder / "pytorch_model.bin").write_bytes(content)
        else:
            torch.save(content, folder / "pytorch_model.bin")

    return broken


def settings(**changes: Any) -> Break:
    def broken(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return broken


def poisoned(value: float) -> Break:
    return tensors(lambda held: held[WEIGHT].view(-1)[7:8].fill_(value))


SAFETENSORS: dict[str, Break] = {
    "cut": bytes_of_weights(lambda raw: raw[:5000]),
    "empty": bytes_of_weights(lambda raw: b""),
    "huge header": bytes_of_weights(lambda raw: b"\xff" * 8 + raw[8:]),
    "header of nothing": bytes_of_weights(lambda raw: raw[:8] + b"\0" * 200 + raw[208:]),
    "a tensor less": tensors(lambda held: held.pop(WEIGHT)),
    "another shape": tensors(lambda held: held.update({WEIGHT: torch.zeros(3, 4)})),
}
CONFIGS: dict[str, Break] = {
    "text for a number": settings(hidden_size="64"),
    "no heads": settings(num_attention_heads=0),
    "rope": settings(rope_parameters=[1]),
    "activation": settings(hidden_act="nope"),
    "type": settings(model_type=5),
}
OTHERS: dict[str, Break] = {
    "pickle of code": pickled({"a": Evil()}),
    "pickle of junk": pickled(b"junk"),
    "empty pickle": pickled(b""),
    "pickle of a list": pickled([1, 2]),
    "NaN": poisoned(float("nan")),
    "inf": poisoned(float("inf")),
    "-inf": poisoned(-float("inf")),
}


def broken_copy(model: Path, change: Break) -> Path:
    copy = model.with_name("broken")
    shutil.copytree(model, copy)
    change(copy)
    return copy


@pytest.mark.parametrize("name", [*SAFETENSORS, *CONFIGS, *OTHERS])
def test_a_broken_model_is_one_line(
    tiny_model: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = broken_copy(tiny_model, (SAFETENSORS | CONFIGS | OTHERS)[name])
    for read in (load_subject, load_judged):
        with pytest.raises(ValueError) as raised:
            read(str(model), tmp_path)
        line = str(raised.value)
        assert str(model) in line and "\n" not in line
        assert len(line.replace(str(model), "")) < 220
    assert not Path("EVIL").exists()


@pytest.mark.parametrize("name", [*SAFETENSORS, *CONFIGS, "pickle of code"])
def test_a_broken_model_is_no_start(tiny_model: Path, name: str, tmp_path: Path) -> None:
    config = LlamaConfig.from_pretrained(tiny_model)
    model = broken_copy(tiny_model, (SAFETENSORS | CONFIGS | OTHERS)[name])
    with pytest.raises(ValueError, match=r"^init_from=\S+broken") as raised:
        pretrained_model(str(model), config)
    assert "\n" not in str(raised.value)


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=257, n_embd=64, n_layer=1, n_head=4, n_positions=64)
    )


def opt() -> nn.Module:
    sizes = {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    return OPTForCausalLM(
        OPTConfig(vocab_size=257, max_position_embeddings=64, word_embed_proj_dim=64, **sizes)
    )


def llama4() -> nn.Module:
    own = {"intermediate_size_mlp": 96, "head_dim": 16, "num_local_experts": 2}
    return Llama4ForCausalLM(
        Llama4TextConfig(**SIZES | own, num_experts_per_tok=1, attention_chunk_size=32)
    )


LOOKED_AT: list[tuple[Callable[[], nn.Module], list[str], int, str]] = [
    (gpt2, ["eval", "--against", "MODEL", "--seq-len", "65"], 2, "--seq-len 65: MODEL has 64"),
    (gpt2, ["eval", "--against", "MODEL", "--seq-len", "64"], 0, ""),
    (opt, ["eval", "--formats", "mxint8", "--seq-len", "65"], 2, "--seq-len 65: MODEL has 64"),
    (opt, ["eval", "--formats", "mxint8", "--seq-len", "64"], 0, ""),
    (opt, ["analyze", "--formats", "mxint8", "--seq-len", "65"], 2, "--seq-len 65: MODEL has 64"),
    (
        llama4,
        ["eval", "--formats", "mxint8", "--seq-len", "32"],
        2,
        "Llama4Router is not nn.Linear",
    ),
    (llama4, ["eval", "--formats", "mxint8", "--skip", "*router", "--seq-len", "32"], 0, ""),
    (llama4, ["analyze", "--formats", "mxint8", "--seq-len", "32"], 0, "2 Llama4Router"),
]


@pytest.mark.parametrize(("make", "call", "code", "said"), LOOKED_AT)
def test_models_of_other_kinds(
    make: Callable[[], nn.Module],
    call: list[str],
    code: int,
    said: str,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    make().save_pretrained("model")
    verb, *options = call
    arguments = [option.replace("MODEL", "model") for option in options]
    source = ["--text", str(text), "--tokenizer", "bytes", "--windows", "2"]
    assert main([verb, "model", *arguments, *source]) == code
    found = capsys.readouterr()
    assert said.replace("MODEL", "model") in (found.err if code else found.out)
