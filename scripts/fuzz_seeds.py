"""A valid file of every kind for scripts/fuzz.py, and its reader."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_run import write_inputs

from data.pretrained import load_vocabulary
from data.shards import Manifest, TokenShards
from data.verify import verify
from train.checkpoints.folder import complete_checkpoints, load_state, verify_checkpoint
from train.cli import main
from train.compare.branches import read_branches
from train.compare.golden import export_curves, import_curves
from train.compare.stopping import Stopping, read_stopping, write_stopping
from train.config.strict_yaml import read_yaml
from train.model.initial import pretrained_model
from train.quantized.tensors import entries_of
from train.runs.casts import CastGap, read_cast_gaps, write_cast_gaps
from train.runs.metrics import read_metrics
from train.runs.record import checked_record
from train.runs.run import Run, read_run
from train.subjects.gguf import read_gguf
from train.subjects.gguf_llama import llama_of, vocabulary_of
from train.subjects.models import load_subject

Parts = tuple[Path, Callable[[], Any], bool]


def readers_of(folder: Path) -> dict[str, Parts]:
    """By name: a file, what reads it, and whether it is held to a checksum."""
    torch.set_num_threads(1)
    tokens, config = write_inputs(folder)
    run, arm = folder / "runs" / "bf16", folder / "runs" / "mxint8"
    for one in (run, arm):
        recipe = Path(__file__).parents[1] / "configs" / "recipe" / f"{one.name}.yaml"
        place = ["--data.path", str(tokens), "--run_dir", str(one), "--trainer.max_steps", "4"]
        layers = ["-c", str(config), "-c", str(recipe)]
        assert main(["fit", *layers, *place]) == 0
    return (
        _of_run(run) | _of_comparison(folder, run, arm) | _of_data(tokens) | _of_models(folder, run)
    )


def _of_run(run: Path) -> dict[str, Parts]:
    point = complete_checkpoints(run / "checkpoints")[-1]
    metrics = run / "metrics.csv"
    return {
        "config.yaml": (run / "config.yaml", lambda: read_yaml(run / "config.yaml"), False),
        "config.yaml of a run": (run / "config.yaml", lambda: _what(read_run(run)), True),
        "run.json": (run / "run.json", lambda: checked_record(run), False),
        "run.json of a run": (run / "run.json", lambda: _what(read_run(run)), True),
        "metrics.csv": (metrics, lambda: read_metrics(metrics, "finished"), False),
        "metrics.csv of a run": (metrics, lambda: _what(read_run(run)), True),
        "checkpoint's manifest": (point / "manifest.json", lambda: verify_checkpoint(point), True),
        "checkpoint": (point / "state.ckpt", lambda: verify_checkpoint(point), True),
        "state.ckpt": (point / "state.ckpt", lambda: load_state(point) and None, False),
        "lowbit.json": (run / "hf/lowbit.json", lambda: _what(read_run(run)), True),
    }


def _what(run: Run) -> dict[str, Any]:
    """What a comparison takes of a run."""
    columns = {name: column.tobytes() for name, column in run.metrics.items()}
    known = {"status": run.status, "recipe": run.recipe, "seed": run.seed, "control": run.control}
    return columns | known | {"identity": run.identity.hash, "declared": run.declared}


def _of_comparison(folder: Path, run: Path, arm: Path) -> dict[str, Parts]:
    gap = CastGap(0.125, 0.01, 64, 2048, 0.003, 0.0001, 1e-6, 0.1, 0.15)
    write_cast_gaps(run, {"bf16": gap, "mxint8": gap})
    write_stopping(folder / "runs", Stopping(0.01, (0, 1, 2, 3)))
    golden, out = folder / "golden.json", folder / "branches"
    export_curves([read_run(run), read_run(arm)], golden)
    point = str(complete_checkpoints(run / "checkpoints")[0])
    recipes = [
        str(Path(__file__).parents[1] / f"configs/recipe/{n}.yaml") for n in ("bf16", "mxint8")
    ]
    branch = ["--branch-from", point, "--horizon", "1", "--branches", "1", "--out", str(out)]
    assert main(["sweep", *branch, "--recipes", *recipes]) == 0
    return {
        "cast_gap.json": (run / "cast_gap.json", lambda: read_cast_gaps(run), True),
        "stopping.json": (
            folder / "runs/stopping.json",
            lambda: read_stopping(folder / "runs"),
            True,
        ),
        "branches.json": (out / "branches.json", lambda: read_branches(out), True),
        "golden curves": (golden, lambda: [_what(one) for one in import_curves(golden)], True),
    }


def _of_data(tokens: Path) -> dict[str, Parts]:
    def shards() -> Any:
        manifest = Manifest.load(tokens)
        verify(tokens, manifest, trust_earlier=False)
        split = TokenShards(tokens, manifest, "train")
        return manifest.fingerprint, split.read(0, len(split)).tobytes()

    shard, tokenizer = tokens / "train-00000.npy", tokens / "tokenizer.json"
    return {
        "corpus's manifest": (tokens / "manifest.json", lambda: Manifest.load(tokens), True),
        "shard": (shard, shards, True),
        "tokenizer of a corpus": (tokenizer, shards, True),
        "tokenizer.json": (tokenizer, lambda: _encoded(tokenizer), False),
    }


def _encoded(tokenizer: Path) -> list[int]:
    found: list[int] = load_vocabulary(str(tokenizer)).encode("One two three.").tolist()
    return found


def _of_models(folder: Path, run: Path) -> dict[str, Parts]:
    hf = folder / "model"
    hf.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (hf / name).write_bytes((run / "hf" / name).read_bytes())
    config, weights = hf / "config.json", hf / "model.safetensors"
    llama: Any = load_subject(str(hf), folder).model.config
    gguf = folder / "model.gguf"
    gguf.write_bytes(_gguf(hf, folder))

    def of_gguf() -> None:
        file = read_gguf(gguf)
        vocabulary_of(file).encode("a b")
        llama_of(file)

    return {
        "gguf": (gguf, of_gguf, False),
        "safetensors, eval": (weights, lambda: load_subject(str(hf), folder) and None, False),
        "safetensors, init_from": (
            weights,
            lambda: pretrained_model(str(hf), llama) and None,
            False,
        ),
        "safetensors, quantize": (weights, lambda: _all_bytes(weights), False),
        "config.json, eval": (config, lambda: load_subject(str(hf), folder) and None, False),
        "config.json, init_from": (
            config,
            lambda: pretrained_model(str(hf), llama) and None,
            False,
        ),
        "weights of a run": (run / "hf/model.safetensors", lambda: _read_whole(run), True),
    }


def _all_bytes(path: Path) -> int:
    return sum(len(chunk) for entry in entries_of(path) for chunk in entry.chunks())


def _read_whole(run: Path) -> Any:
    state = load_subject(str(run), run).model.state_dict()
    return {name: tensor.numpy().tobytes() for name, tensor in state.items()}


def _gguf(hf: Path, folder: Path) -> bytes:
    """The model in llama.cpp's names; its rows are not in llama.cpp's order."""
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {f"{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    whole = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    subject: Any = load_subject(str(hf), folder)
    config, info, data = subject.model.config, b"", b""
    for name, weight in subject.model.state_dict().items():
        *path, part, _ = name.split(".")
        stem = whole[part] if part in whole else f"blk.{path[2]}.{names[part]}"
        data += b"\0" * (-len(data) % 32)
        shape = tuple(weight.shape)[::-1]
        info += _text(f"{stem}.weight") + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        info += struct.pack("<IQ", 0, len(data))
        data += weight.numpy().tobytes()
    size = config.vocab_size
    metadata = {
        "general.architecture": "llama", "general.alignment": 32,
        "llama.embedding_length": config.hidden_size, "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size, "llama.context_length": 64,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-6, "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["<e>", "a", "b", "ab", *(f"t{i}" for i in range(size - 4))],
        "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.token_type": [3, *[1] * (size - 1)],
        "tokenizer.ggml.eos_token_id": 0,
    }  # fmt: skip
    tensors = len(subject.model.state_dict())
    head = b"GGUF" + struct.pack("<IQQ", 3, tensors, len(metadata))
    head += b"".join(_text(key) + _value(value) for key, value in metadata.items()) + info
    return head + b"\0" * (-len(head) % 32) + data


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> bytes:
    match value:
        case str():
            return struct.pack("<I", 8) + _text(value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case _:
            texts = isinstance(value[0], str)
            items = [_text(one) if texts else struct.pack("<i", one) for one in value]
            return struct.pack("<IIQ", 9, 8 if texts else 5, len(value)) + b"".join(items)
