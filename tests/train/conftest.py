"""Run folders as `lowbit fit` leaves them, with losses that a test chooses."""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

# programs that tests start
collect_ignore = [
    *("curve.py", "malloc_peak.py", "plain_transformers.py", "recorder.py", "two_ranks.py"),
]
BATCH, SEQ_LEN = 4, 8
COLUMNS = "step,tokens_seen,train/loss,grad_norm,lr,tokens_per_second,val/loss,val/perplexity"


def _make_run(
    folder: Path,
    train: list[float],
    val: dict[int, float],
    *,
    recipe: str = "bf16",
    seed: int = 0,
    status: str = "finished",
    max_steps: int | None = None,
    **info: Any,
) -> Path:
    """`train`: a loss per step; `val`: step -> loss; `info` replaces keys of run.json."""
    folder.mkdir(parents=True)
    rows = [COLUMNS]
    for step, loss in enumerate(train, 1):
        cells = [step, step * BATCH * SEQ_LEN, loss, 1.0 + seed / 8, 0.001, 1000.0 + step]
        cells += [val[step], 2.0] if step in val else ["", ""]
        rows.append(",".join(map(str, cells)))
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    data = {"path": "corpus", "fingerprint": "f0", "vocab_size": 64, "seed": seed}
    known: dict[str, Any] = {
        "format_version": 1, "status": status, "recipe": recipe, "recipe_table": [{"*": recipe}],
        "seed": seed, "data": data | {"seq_len": SEQ_LEN, "global_batch_size": BATCH},
        "model": {"hidden_size": 16}, "initial_weights": f"w{seed}", "init_from": None,
        "max_steps": max_steps or len(train), "world_size": 1, "threads": 1,
        "versions": {"torch": "2.13.0"}, "commit": "c0ffee", "command": ["lowbit", "fit", "a b"],
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(known | info))
    (folder / "config.yaml").write_text(f"recipe: {recipe}\noptimizer:\n  lr: 0.001\n")
    return folder


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    return _make_run


TINY = """
model:
  llama: {hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4,
    num_key_value_heads: 2, vocab_size: 320, max_position_embeddings: 64, attention_dropout: 0.1}
  optimization: {lr: 1.0e-2, warmup_steps: 2}
data: {seq_len: 32, global_batch_size: 8, val_windows: 4}
trainer: {max_steps: 6, val_check_interval: 3, accelerator: cpu}
"""


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared bytes of a text that is its own witness: no download."""
    from data.prepare import PrepareRequest, prepare

    folder = tmp_path_factory.mktemp("data")
    for index in range(20):
        lines = (f"{index} times {n} is {index * n}, as every child knows." for n in range(40))
        (folder / f"{index}.txt").write_text("\n".join(lines))
    out = folder / "tokens"
    request = PrepareRequest(text=(f"{folder}/*.txt",), tokenizer="bytes", val_fraction=0.2)
    prepare(out, request)
    return out


@pytest.fixture(scope="session")
def recipes() -> Path:
    return Path(__file__).parents[2] / "configs" / "recipe"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a run of seconds."""
    config = tmp_path_factory.mktemp("configs") / "tiny.yaml"
    config.write_text(TINY)
    return config


@pytest.fixture(scope="session")
def fit(tiny_data: Path, recipes: Path, tiny: Path) -> Callable[..., int]:
    """`lowbit fit` of a tiny model in this process, on one thread: sums depend on their number."""

    def run(run_dir: Path, recipe: str, *overrides: str) -> int:
        from train.cli import main

        layers = ["-c", str(tiny), "-c", str(recipes / f"{recipe}.yaml")]
        place = ["--data.path", str(tiny_data), "--run_dir", str(run_dir)]
        return main(["fit", *layers, *place, *overrides])

    return run


@pytest.fixture(scope="session")
def whole_run(
    fit: Callable[..., int], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """The folder of an uninterrupted run with these arguments: trained once, to be looked at."""

    @cache
    def train(recipe: str, *overrides: str) -> Path:
        folder = tmp_path_factory.mktemp("whole") / "run"
        assert fit(folder, recipe, *overrides) == 0
        return folder

    return train


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def on_micro_batch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have something done while the micro-batch with this number, from 0, is trained on."""
    from train.model.module import PretrainModule

    original = PretrainModule.training_step

    def install(number: int, act: Callable[[PretrainModule], Any]) -> None:
        def step(self: PretrainModule, batch: Any, batch_idx: int) -> Any:
            if self.trainer.fit_loop.total_batch_idx == number:
                act(self)
            return original(self, batch, batch_idx)

        monkeypatch.setattr(PretrainModule, "training_step", step)

    return install


def _same(a: Any, b: Any, where: str) -> None:
    """Bitwise, through nested containers."""
    import torch

    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            _same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            _same(left, right, f"{where}.{index}")
    else:
        assert a == b, where


@pytest.fixture(scope="session")
def assert_same_run() -> Callable[..., None]:
    """Every logged number but times, weights, optimizer, generators: bit for bit.

    `but` names further columns of metrics.csv that may differ.
    """
    import csv

    from train.checkpoints.folder import complete_checkpoints, load_state, verify_checkpoint

    def rows(run: Path, but: tuple[str, ...]) -> list[dict[str, str]]:
        with (run / "metrics.csv").open(newline="") as file:
            kept = csv.DictReader(file)
            skipped = ("tokens_per_second", *but)
            return [{k: v for k, v in row.items() if k not in skipped} for row in kept]

    def final(run: Path) -> dict[str, Any]:
        path = complete_checkpoints(run / "checkpoints")[-1]
        verify_checkpoint(path)
        state = load_state(path)
        del state["loops"]  # Lightning's counters of its own restarts
        state["origin"].pop("metrics", None)  # of bytes that hold times
        return state

    def compare(a: Path, b: Path, but: tuple[str, ...] = ()) -> None:
        assert rows(a, but) == rows(b, but)
        _same(final(a), final(b), "checkpoint")

    return compare


@pytest.fixture
def save() -> Callable[..., Path]:
    """Write a small checkpoint of a step, whose weights are its number, `full` or `sharded`."""
    import torch

    from train.checkpoints.folder import AtomicCheckpointIO
    from train.checkpoints.sharded import save_sharded

    def write(folder: Path, step: int, kind: str = "full") -> Path:
        weights = {"weights": torch.full((300,), float(step))}
        adam = {"state": {0: {"exp_avg": torch.full((300,), step + 0.5)}}, "param_groups": []}
        state = {"state_dict": weights, "optimizer_states": [adam], "origin": {"step": step}}
        path = folder / f"step-{step:08d}"
        if kind == "full":
            AtomicCheckpointIO().save_checkpoint(state, path)
        else:
            save_sharded(state, path)
        return path

    return write


@pytest.fixture(scope="session")
def ranks(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Runs of two processes, all by one program, which the first of xdist's processes starts."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, program = base / "ranks", Path(__file__).with_name("two_ranks.py")
    with (base / "ranks.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            folder.mkdir()
            command = [sys.executable, str(program), str(folder), str(tiny_data)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            ended = subprocess.run(
                command, capture_output=True, text=True, timeout=900, env=environment
            )
            assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return folder, json.loads((folder / "results.json").read_text())
