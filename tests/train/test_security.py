"""Nothing that a run reads can run code or leave its folder: refused, without side effects."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from train.checkpoints.distributed import METADATA
from train.checkpoints.folder import (
    AtomicCheckpointIO,
    complete_checkpoints,
    load_state,
    open_staging,
    publish,
    read_manifest,
)
from train.checkpoints.sharded import save_sharded
from train.cli import main
from train.config.strict_yaml import YamlError, load_yaml
from train.runs.names import checked_name, checked_run_dir
from train.sweep.request import SweepRequest

Fit = Callable[..., int]


class Exploit:
    """Unpickled anywhere, it leaves a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.sentinel}",)


def test_the_exploit_works(tmp_path: Path) -> None:
    """Else the tests below would show nothing."""
    pickle.loads(pickle.dumps(Exploit(tmp_path / "sentinel")))
    assert (tmp_path / "sentinel").exists()


def test_malicious_pickle_ckpt(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a manifest that is right in every byte: whoever can write the one can write both."""
    run, sentinel = tmp_path / "run", tmp_path / "sentinel"
    assert fit(run, "bf16", "--trainer.max_steps", "1") == 0
    (path,) = complete_checkpoints(run / "checkpoints")
    origin = json.loads((path / "manifest.json").read_text())["origin"]
    AtomicCheckpointIO().remove_checkpoint(path)
    AtomicCheckpointIO().save_checkpoint({"x": Exploit(sentinel), "origin": origin}, path)
    assert fit(run, "bf16", "--trainer.max_steps", "2") == 2
    assert "holds more than plain data" in capsys.readouterr().err
    assert fit(run, "bf16", "--trainer.max_steps", "2", "--resume", str(path)) == 2
    assert not sentinel.exists()


def _index(case: str, sentinel: Path, path: Path) -> bytes:
    """A `.metadata` that wants more than to say where tensors lie."""
    if case == "code":
        return pickle.dumps(Exploit(sentinel))
    metadata = pickle.loads((path / METADATA).read_bytes())
    if case == "object":
        metadata.state_dict_metadata["state_dict.x"] = BytesStorageMetadata()
    else:
        for info in metadata.storage_data.values():
            info.relative_path = "../outside"
    return pickle.dumps(metadata)


@pytest.mark.parametrize(
    ("case", "message"),
    [("code", "more than plain data"), ("object", "more than plain data"), ("path", "outside")],
)
def test_malicious_sharded_metadata(
    case: str, message: str, fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a checkpoint whose manifest is right in every byte."""
    run, sentinel = tmp_path / "run", tmp_path / "sentinel"
    assert fit(run, "bf16", "--trainer.max_steps", "1") == 0
    (path,) = complete_checkpoints(run / "checkpoints")
    state = load_state(path)
    AtomicCheckpointIO().remove_checkpoint(path)
    save_sharded(state, path)
    assert fit(run, "bf16", "--trainer.max_steps", "2", "--keep_checkpoints", "3") == 0
    shutil.rmtree(run / "checkpoints" / "step-00000002")  # the sharded one was read; now the bad
    index = _index(case, sentinel, path)
    (path / METADATA).write_bytes(index)
    manifest = read_manifest(path)
    manifest["files"][METADATA] = hashlib.sha256(index).hexdigest()
    staging = path.rename(path.with_name(path.name + ".tmp"))
    publish(staging, path, manifest["files"], manifest["origin"])
    assert fit(run, "bf16", "--trainer.max_steps", "2") == 2
    assert message in capsys.readouterr().err
    assert not sentinel.exists()


def test_a_manifest_cannot_reach_out_of_its_folder(tmp_path: Path) -> None:
    target = tmp_path / "step-00000001"
    staging = open_staging(target)
    (tmp_path / "outside").write_text("x")
    publish(staging, target, {"../outside": "0" * 64}, {})
    with pytest.raises(ValueError, match=r"\.\./outside"):
        AtomicCheckpointIO().load_checkpoint(target)


PAIRS = ("ab", "bc", "cd", "de", "ef")
BAD_YAML = {
    "python tag": ("data: !!python/object/apply:os.system ['touch {sentinel}']", "constructor"),
    "python name": ("data: !!python/name:os.system", "constructor"),
    "foreign class": (
        "trainer: {{callbacks: [{{class_path: subprocess.Popen, init_args: "
        "{{args: touch {sentinel}}}}}]}}",
        "subprocess.Popen",
    ),
    "foreign module": ("trainer: {{strategy: evil.Strategy}}", "evil.Strategy"),
    "foreign model": ("model: {{llama: {{class_path: evil.LlamaConfig}}}}", "evil.LlamaConfig"),
    "unknown key": ("modle: {{llama: 1}}", "modle"),
    "duplicate key": ("data: {{seq_len: 8, seq_len: 16}}", "'seq_len' is there twice"),
    "duplicate at top": ("data: {{seq_len: 8}}\ndata: {{seq_len: 16}}", "'data' is there twice"),
    "wrong type": ("trainer: {{max_steps: 2.5}}", "max_steps"),
    "not a number": ("model: {{optimization: {{lr: fast}}}}", "lr"),
    "deep": ("data: " + "[" * 3000, "nested deeper"),
    "huge": ("# " + "x" * 2_000_000, "characters of YAML"),
    "aliases": (
        "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
        + "\n".join(f"{y}: &{y} [{','.join(['*' + x] * 10)}]" for x, y in PAIRS),
        "nodes",
    ),
    "alias of itself": ("data: &a [*a]", "contains itself"),
    "not YAML": ("data: [1, 2", "expected"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_YAML)
def test_malicious_yaml(
    case: str, fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line on stderr, exit code 2, no file, no child; an alias bomb would not end."""
    text, message = BAD_YAML[case]
    sentinel = tmp_path / "sentinel"
    bad = tmp_path / "bad.yaml"
    bad.write_text(text.format(sentinel=sentinel) if "{{" in text or "{s" in text else text)
    assert fit(tmp_path / "run", "bf16", "-c", str(bad)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lowbit")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not sentinel.exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), ("-.5", -0.5), ("1.", 1.0), ("7", 7), ("0x1f", "0x1f"),
        ("no", "no"), ("0123", "0123"), ("1_000", "1_000"), ("12:30", "12:30"), ("true", True),
        ("2020-01-01", "2020-01-01"), ("~", None), ("'1e-4'", "1e-4"), ("-.inf", float("-inf")),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = load_yaml(f"a: {text}")["a"]
    assert (found, type(found)) == (value, type(value))


def test_a_merge_key_is_no_merge() -> None:
    assert load_yaml("a: &a {x: 1}\nb: {<<: *a}") == {"a": {"x": 1}, "b": {"<<": {"x": 1}}}


def test_the_number_of_a_yaml_file_reaches_the_optimizer(fit: Fit, tmp_path: Path) -> None:
    extra = tmp_path / "lr.yaml"
    extra.write_text("model: {optimization: {lr: 1e-4, warmup_steps: 0, min_lr_ratio: 1.0}}")
    assert fit(tmp_path / "run", "bf16", "-c", str(extra), "--trainer.max_steps", "1") == 0
    header, row = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert float(dict(zip(header.split(","), row.split(","), strict=True))["lr"]) == 1e-4


@pytest.mark.parametrize(
    "name", ["../up", "a/b", "/root", "..", "", "$HOME", "~", ".hidden", "x" * 65]
)
def test_path_traversal_in_a_name(name: str, fit: Fit, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(ValueError, match="becomes a folder"):
        checked_name(name)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{policy: {{name: {json.dumps(name)}}}}}")
    with pytest.raises(ValueError, match="becomes a folder"):
        SweepRequest(tmp_path / "out", (), (recipe,), (0,), {}, ())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml"]


@pytest.mark.parametrize("run_dir", ["../up", "runs/../../up", "$HOME/run", "~/run"])
def test_path_traversal_in_run_dir(run_dir: str, fit: Fit, capsys: Any) -> None:
    with pytest.raises(ValueError, match="not allowed"):
        checked_run_dir(run_dir)
    assert fit(Path(run_dir), "bf16") == 2
    assert "run_dir=" in capsys.readouterr().err


def test_exports_are_safetensors(fit: Fit, tmp_path: Path) -> None:
    assert fit(tmp_path / "run", "bf16", "--trainer.max_steps", "1") == 0
    names = {p.name for p in (tmp_path / "run" / "hf").iterdir()}
    assert "model.safetensors" in names
    assert all(Path(name).suffix in (".safetensors", ".json", ".md") for name in names)


def test_pickled_weights_are_no_start(fit: Fit, tmp_path: Path, capsys: Any) -> None:
    """`init_from` with a `pytorch_model.bin`."""
    assert fit(tmp_path / "run", "bf16", "--trainer.max_steps", "1") == 0
    source, sentinel = tmp_path / "run" / "hf", tmp_path / "sentinel"
    for name in ("model.safetensors", "lowbit.json"):
        (source / name).unlink()
    torch.save({"x": Exploit(sentinel)}, source / "pytorch_model.bin")
    assert fit(tmp_path / "second", "bf16", "--model.init_from", str(source)) == 2
    assert "safetensors" in capsys.readouterr().err
    assert not sentinel.exists()


def test_yaml_errors_name_the_line() -> None:
    with pytest.raises(YamlError, match="line 2"):
        load_yaml("a: 1\na: 2")


def test_a_bad_verb_reads_nothing(capsys: Any) -> None:
    assert main(["../evil"]) == 2


@pytest.mark.parametrize("sizes", [{}, {"data_parallel_size": 1, "tensor_parallel_size": 2}])
def test_tensor_parallelism_is_refused(
    sizes: dict[str, int], fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lightning's ModelParallelStrategy is that by default, and writes its own checkpoints."""
    path = "lightning.pytorch.strategies.ModelParallelStrategy"
    strategy = json.dumps({"class_path": path, "init_args": sizes})
    assert fit(tmp_path / "run", "bf16", "--trainer.strategy", strategy) == 2
    error = capsys.readouterr().err
    assert "is ModelParallelStrategy: expected auto (one device), ddp or fsdp2" in error
    assert not (tmp_path / "run").exists()
