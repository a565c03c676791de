"""Runs of two ranks over gloo for test_faults.py; ranks are forks: the imports are paid once.

python two_ranks.py FOLDER TOKENS      writes FOLDER/results.json
"""

import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from train.checkpoint import complete_checkpoints
from train.cli import main
from train.fit import fit  # noqa: F401  # imported before the forks
from train.module import PretrainModule

CONFIG = """
model:
  llama: {hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4,
    num_key_value_heads: 2, vocab_size: 320, max_position_embeddings: 64, attention_dropout: 0.1}
  optimization: {lr: 1.0e-2, warmup_steps: 2}
  policy:
    name: stochastic
    recipe: {fprop_input: mxint8, fprop_weight: mxint8, dgrad_weight: mxint8, wgrad_input: mxint8,
      dgrad_grad_output: {name: mxint8, rounding: stochastic},
      wgrad_grad_output: {name: mxint8, rounding: stochastic}}
data: {seq_len: 32, global_batch_size: 8, val_windows: 8}
trainer: {max_steps: 6, accelerator: cpu, accumulate_grad_batches: 2, val_check_interval: 6,
  strategy: ddp}
checkpoint_every: 1
collective_timeout: 60
"""
Act = Callable[[PretrainModule], Any]


def rank_of_run(
    folder: Path, tokens: Path, run: str, rank: int, ranks: int, port: int, act: Act | None
) -> int:
    """One rank, in a process of its own; its id."""
    child = os.fork()
    if child:
        return child
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    log = os.open(folder / f"{run}-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    watch(folder / f"{run}-{rank}.windows", act)
    own = ["--data.path", str(tokens), "--run_dir", str(folder / run)]
    try:
        code = main(
            ["fit", "-c", str(folder / "config.yaml"), *own, "--trainer.devices", str(ranks)]
        )
    except BaseException as error:
        print(repr(error))
        code = 99
    sys.stdout.flush()
    os._exit(code)


def watch(seen: Path, act: Act | None) -> None:
    """Write down each micro-batch's windows; act in the first micro-batch of step 3."""
    original = PretrainModule.training_step

    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        with seen.open("a") as file:
            file.write(json.dumps([self.trainer.global_step, batch["window"].tolist()]) + "\n")
        if act is not None and batch_idx == 4:
            act(self)
        return original(self, batch, batch_idx)

    PretrainModule.training_step = step  # type: ignore[method-assign]


def run_ranks(
    folder: Path, tokens: Path, run: str, ranks: int = 2, act: Act | None = None
) -> dict[str, Any]:
    """All ranks of a run, `act` on the last; exit codes, windows by step, the log of rank 0."""
    for old in folder.glob(f"{run}-*"):
        old.unlink()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = [
        rank_of_run(folder, tokens, run, rank, ranks, port, act if rank == ranks - 1 else None)
        for rank in range(ranks)
    ]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    windows: dict[int, list[int]] = {}
    for rank in range(ranks):
        seen = folder / f"{run}-{rank}.windows"
        for line in seen.read_text().splitlines() if seen.exists() else []:
            step, ids = json.loads(line)
            windows.setdefault(step, []).extend(ids)
    saved = complete_checkpoints(folder / run / "checkpoints")
    return {
        "codes": codes,
        "windows": {step: sorted(ids) for step, ids in windows.items()},
        "newest": saved[-1].name if saved else None,
        "log": (folder / f"{run}-0.log").read_text()[-5000:],
    }


def poison(module: PretrainModule) -> None:
    layer: Any = module.model.model.layers[1].mlp.up_proj
    layer.register_forward_hook(lambda *args: args[2].index_fill(-1, torch.tensor([3]), torch.inf))


def scenarios(folder: Path, tokens: Path) -> dict[str, Any]:
    """In their order: some go on from what an earlier one left."""
    torch.set_num_threads(1)
    (folder / "config.yaml").write_text(CONFIG)
    results = {"whole": run_ranks(folder, tokens, "whole")}
    stop = signal.SIGTERM
    results["sigterm rank 1"] = run_ranks(
        folder, tokens, "two", act=lambda module: os.kill(os.getpid(), stop)
    )
    shutil.copytree(folder / "two", folder / "one")
    results["resumed on 2"] = run_ranks(folder, tokens, "two")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("  strategy: ddp", "  strategy: auto"))
    results["resumed on 1"] = run_ranks(folder, tokens, "one", ranks=1)
    (folder / "config.yaml").write_text(text)
    results["nan rank 1"] = run_ranks(folder, tokens, "nan", act=poison)
    results["kill rank 1"] = run_ranks(
        folder, tokens, "kill", act=lambda module: os.kill(os.getpid(), signal.SIGKILL)
    )
    return results


if __name__ == "__main__":
    results = scenarios(Path(sys.argv[1]), Path(sys.argv[2]))
    (Path(sys.argv[1]) / "results.json").write_text(json.dumps(results))
