"""What `lowbit quantize` refuses: one line, exit code 2, nothing written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from train.cli import main
from train.quantized.model import read_quantized
from train.quantized.overlap import LENGTH, fingerprints, refuse_overlap

FLAGS = [
    (["--format", "mxfp3"], "unknown block format 'mxfp3'"),
    (["--format", "{name: mxfp4, blocks: 8}"], "blocks"),
    (["--format", "{name: nvfp4, outer_scale: row}"], "none by row"),
    ([], "--format is missing"),
    (["--format", "mxfp4", "--method", "awq"], "--method 'awq': expected one of rtn, gptq"),
    (["--format", "mxfp4", "--observer", "max"], "--observer 'max': expected one of minmax, mse"),
    (["--format", "mxfp4", "--order", "random"], "--order 'random'"),
    (["--format", "mxfp4", "--inputs", "mine"], "--inputs 'mine'"),
    (["--format", "mxfp4", "--inputs", "quantized"], "needs --activations"),
    (["--format", "mxfp4", "--alpha", "0.25"], "--alpha 0.25: needs --inputs"),
    (["--format", "mxfp4", "--alpha", "2", "--inputs", "propagated"], "--alpha 2.0 is not in 0"),
    (["--format", "mxfp4", "--method", "rtn", "--order", "activation"], "has no effect"),
    (["--format", "mxfp4", "--method", "rtn", "--damping", "0.1"], "has no effect"),
    (["--format", "mxfp4", "--observer", "minmax", "--search", "after"], "has no effect"),
    (["--format", "mxfp4", "--transform-size", "32"], "has no effect"),
    (["--format", "mxfp4", "--damping", "-1"], "damping=-1.0"),
    (["--format", "mxfp4", "--transform", "fourier"], "--transform 'fourier'"),
    (["--format", "mxfp4", "--transform", "hadamard", "--transform-size", "24"], "power of two"),
    (["--format", "mxfp4", "--transform", "dct", "--transform-size", "40"], "does not divide"),
    (["--format", "{name: mxfp4, block_size: 64}"], "blocks of 64 do not divide"),
    (["--format", "{name: mxfp4, block_size: [8, 8]}"], "1-D blocks"),
    (["--format", "nvfp4", "--four-thirds"], "of mxfp4 alone"),
    (["--format", "mxint4", "--reach", "7.5"], "FP32 or BF16 scales"),
    (["--format", "mxfp4", "--windows", "4000"], "fewer than 4000 windows"),
    (["--format", "mxfp4", "--windows", "0"], "both at least 1"),
    (["--format", "mxfp4", "--text", "nothing.txt"], "--text nothing.txt"),
    (["--format", "mxfp4", "--recipe", "nothing.yaml"], "nothing.yaml"),
]


def _refused(
    code: int, said: str, capsys: pytest.CaptureFixture[str], folder: Path, before: set[Path]
) -> None:
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and error.startswith("lowbit: error: ")
    assert said in error and len(error) < 300
    assert set(folder.rglob("*")) == before


@pytest.mark.parametrize(("flags", "said"), FLAGS)
def test_flags(
    flags: list[str],
    said: str,
    make_model: Callable[..., Path],
    quantize: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = make_model(num_hidden_layers=1)
    capsys.readouterr()
    before = set(tmp_path.rglob("*"))
    _refused(quantize(model, tmp_path / "out", *flags), said, capsys, tmp_path, before)


def _nothing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _not_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"abcdefgh" * 9)


def _a_tensor_less(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    del held["model.layers.0.mlp.up_proj.weight"]
    save_file(held, folder / "model.safetensors")


def _not_finite(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    held["model.layers.0.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(held, folder / "model.safetensors")


def _infinite_activations(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    held["model.layers.0.input_layernorm.weight"][3] = torch.inf
    save_file(held, folder / "model.safetensors")


def _no_blocks(folder: Path) -> None:
    from transformers import GPT2Config

    for path in folder.iterdir():
        path.unlink()
    config = GPT2Config(vocab_size=257, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def _quantized_elsewhere(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace("{", '{"quantization_config": {"a": 1},', 1))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_nothing, "holds no model.safetensors"),
        (_not_safetensors, "is not a safetensors file"),
        (_a_tensor_less, "lacks the tensor model.layers.0.mlp.up_proj.weight"),
        (_not_finite, "its weights are not finite"),
        (_infinite_activations, "the Hessian is not finite"),
        (_no_blocks, "which has no decoder blocks"),
        (_quantized_elsewhere, "holds quantized weights"),
    ],
)
def test_models(
    spoil: Callable[[Path], None],
    said: str,
    make_model: Callable[..., Path],
    quantize: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = make_model(num_hidden_layers=1)
    spoil(model)
    capsys.readouterr()
    before = set(tmp_path.rglob("*"))
    code = quantize(model, tmp_path / "out", "--format", "mxfp4")
    _refused(code, said, capsys, tmp_path, before)


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.2-1B", "no/such-model", "./missing"])
def test_models_that_are_not_there(
    name: str,
    quantize: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "text.txt").touch()
    before = set(tmp_path.rglob("*"))
    code = quantize(Path(name), tmp_path / "out", "--format", "mxfp4")
    _refused(code, name.removeprefix("./"), capsys, tmp_path, before)


def test_an_empty_text(
    make_model: Callable[..., Path],
    quantize: Callable[..., int],
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = make_model(num_hidden_layers=1)
    text.write_text("")
    capsys.readouterr()
    before = set(tmp_path.rglob("*"))
    code = quantize(model, tmp_path / "out", "--format", "mxfp4")
    _refused(code, "fewer than 4 windows", capsys, tmp_path, before)


@pytest.mark.parametrize("what", ["a file", "a folder of others", "a quantized model as MODEL"])
def test_folders(
    what: str,
    make_model: Callable[..., Path],
    quantize: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, out = make_model(num_hidden_layers=1), tmp_path / "out"
    if what == "a file":
        out.write_text("mine")
    elif what == "a folder of others":
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
    else:
        assert quantize(model, tmp_path / "first", "--format", "mxfp4") == 0
        model = tmp_path / "first"
    capsys.readouterr()
    before = set(tmp_path.rglob("*"))
    said = "quantized already" if what.startswith("a quantized") else "holds other files"
    _refused(quantize(model, out, "--format", "mxfp4"), said, capsys, tmp_path, before)


def test_text_of_the_calibration_is_no_text_to_evaluate_on(
    make_model: Callable[..., Path], quantize: Callable[..., int], text: Path, tmp_path: Path
) -> None:
    model = make_model(num_hidden_layers=1)
    assert quantize(model, tmp_path / "out", "--format", "mxfp4") == 0
    method = read_quantized(tmp_path / "out").method
    tokens = torch.tensor(list(text.read_bytes()))
    start = (len(tokens) + 1 - 49) // 5  # where the first window begins
    for shift in (-30, 0, 7):
        window = tokens[start + shift : start + shift + 200][None]
        with pytest.raises(ValueError, match="that the model was calibrated on"):
            refuse_overlap(method, window, "this text")
    refuse_overlap(method, tokens[None, :start], "the text before it")


def test_eval_refuses_the_text_of_the_calibration_for_what_was_quantized_and_exported(
    make_model: Callable[..., Path], quantize: Callable[..., int], text: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model, out = make_model(num_hidden_layers=1), tmp_path / "out"
    exported = tmp_path / "exported"
    assert quantize(model, out, "--format", "mxfp4") == 0
    assert main(["export", str(out), str(exported), "--layout", "compressed-tensors"]) == 0
    for judged in (out, exported):
        command = ["eval", str(judged), "--against", str(model), "--text", str(text)]
        capsys.readouterr()
        assert main([*command, "--tokenizer", "bytes", "--windows", "9", "--seq-len", "240"]) == 2
        assert "that the model was calibrated on" in capsys.readouterr().err


def test_eval_judges_what_quantize_left(
    make_model: Callable[..., Path], quantize: Callable[..., int], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """On another text; GPTQ's 8-bit weights beside a cast of the same model into 4 bits."""
    model, out = make_model(num_hidden_layers=1), tmp_path / "out"
    other = tmp_path / "other.txt"
    other.write_text("".join(f"Nothing of {i} is said here, nor of {i + 7}.\n" for i in range(200)))
    assert quantize(model, out, "--format", "mxint8") == 0
    where = ["--text", str(other), "--tokenizer", "bytes", "--windows", "3", "--seq-len", "64"]
    command = ["eval", str(out), "--against", str(model), *where, "--formats", "mxint4"]
    capsys.readouterr()
    assert main([*command, "--weight-only", "--out", str(tmp_path / "eval")]) == 0
    assert f"{out} (lowbit)" in capsys.readouterr().out
    rows = {r["format"]: r for r in json.loads((tmp_path / "eval/eval.json").read_text())["rows"]}
    assert rows["bf16"]["KL"] == 0 < rows[str(out)]["KL"] < rows["mxint4"]["KL"] / 20


def test_fingerprints_are_of_runs_wherever_they_lie() -> None:
    tokens = torch.randint(0, 50_000, (1, 600), generator=torch.Generator().manual_seed(0))
    whole = set(fingerprints(tokens))
    assert 20 < len(whole) < 60 and fingerprints(tokens[:, : LENGTH - 1]) == []
    assert set(fingerprints(tokens[:, 123:400])) <= whole
    assert not whole & set(fingerprints(tokens + 1))
