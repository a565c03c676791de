"""Runs of two ranks over gloo for test_faults.py; ranks are forks: the imports are paid once.

Gradients are never clipped here: their norm is a sum in another order in each strategy, and without
it DDP and FSDP2 take the same steps to the bit.

python two_ranks.py FOLDER TOKENS      writes FOLDER/results.json
"""

import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from malloc_peak import measure_memory
from transformers import LlamaConfig, LlamaForCausalLM

from lowbit import bf16
from train.checkpoints import sharded
from train.checkpoints.folder import complete_checkpoints
from train.cli import main
from train.fit.fit import fit  # noqa: F401  # imported before the forks
from train.model.module import PretrainModule

CONFIG = """
model:
  llama: {hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4,
    num_key_value_heads: 2, vocab_size: 320, max_position_embeddings: 64, attention_dropout: 0.1}
  optimization: {lr: 1.0e-2, warmup_steps: 2, max_grad_norm: 1.0e+6}
  policy:
    name: stochastic
    recipe: {fprop_input: mxint8, fprop_weight: mxint8, dgrad_weight: mxint8, wgrad_input: mxint8,
      dgrad_grad_output: {name: mxint8, rounding: stochastic},
      wgrad_grad_output: {name: mxint8, rounding: stochastic}}
data: {seq_len: 32, global_batch_size: 8, val_windows: 6}  # rank 1's last batch is padding
trainer: {max_steps: 6, accelerator: cpu, accumulate_grad_batches: 2, val_check_interval: 3}
checkpoint_every: 1
collective_timeout: 60
"""
MEMORY = """
model:
  llama: {hidden_size: 256, intermediate_size: 704, num_hidden_layers: 2, num_attention_heads: 8,
    num_key_value_heads: 4, vocab_size: 4096, max_position_embeddings: 128}
  policy: {name: bf16}
data: {seq_len: 128, global_batch_size: 8}
trainer: {max_steps: 3, accelerator: cpu, limit_val_batches: 0}
"""
INIT = """
model:
  llama: {hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4,
    num_key_value_heads: 2, vocab_size: 320, max_position_embeddings: 64,
    rms_norm_eps: 0.05, hidden_act: gelu, rope_parameters: {rope_type: llama3, rope_theta: 20.0,
    factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position_embeddings: 32}}
  policy: {name: bf16}
  optimization: {lr: 1.0e-2, warmup_steps: 0, max_grad_norm: 1.0e+6}
data: {seq_len: 32, global_batch_size: 8, val_windows: 6}
trainer: {max_steps: 2, accelerator: cpu, val_check_interval: 1, precision: 32-true}
checkpoint_every: 1
"""
Act = Callable[[PretrainModule], Any]


def start_rank(
    log: Path, rank: int, ranks: int, port: int, prepare: Callable[[int], Any], argv: list[str]
) -> int:
    """`lowbit fit` as torchrun would start it, in a fork, between `prepare` and what that returns;
    its process id.
    """
    child = os.fork()
    if child:
        return child
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    finish = prepare(rank)
    try:
        code = main(["fit", *argv, "--trainer.devices", str(ranks)])
        if finish is not None:
            finish()
    except BaseException as error:
        print(repr(error))
        code = 99
    sys.stdout.flush()
    os._exit(code)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def count_reductions(file: Path) -> None:
    """One byte for each reduce-scatter of gradients."""
    original = torch.distributed.reduce_scatter_single
    file.touch()

    def counting(*args: Any, **kwargs: Any) -> Any:
        with file.open("a") as out:
            out.write(".")
        return original(*args, **kwargs)

    torch.distributed.reduce_scatter_single = counting


def watch(seen: Path, act: Act | None, step: int) -> None:
    """Write down each micro-batch's windows; act in the first micro-batch of this step."""
    original = PretrainModule.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        with seen.open("a") as file:
            file.write(json.dumps([self.trainer.global_step, batch["window"].tolist()]) + "\n")
        if act is not None and batch_idx == 2 * (step - 1):
            act(self)
        return original(self, batch, batch_idx)

    PretrainModule.training_step = training_step  # type: ignore[method-assign]


@dataclass
class Runs:
    folder: Path
    tokens: Path

    def __call__(
        self,
        run: str,
        strategy: str = "ddp",
        act: Act | None = None,
        step: int = 3,
        config: str = "config.yaml",
        way: str | None = None,
    ) -> dict[str, Any]:
        """All ranks of a run, `act` on the last; exit codes, windows by step, rank 0's log.

        `way`: of multiplying BF16.
        """
        for old in self.folder.glob(f"{run}-*"):
            old.unlink()
        ranks, port = 1 if strategy == "auto" else 2, free_port()
        argv = ["-c", str(self.folder / config), "--trainer.strategy", strategy]
        argv += ["--data.path", str(self.tokens), "--run_dir", str(self.folder / run)]
        argv += ["--model.gradient_checkpointing", str(strategy == "fsdp2").lower()]  # same bits

        def prepare(rank: int) -> None:
            if way is not None:
                os.environ[bf16.VARIABLE] = way
                bf16._chosen.cache_clear()
            acts = act if rank == ranks - 1 else None
            count_reductions(self.folder / f"{run}-{rank}.reduced")
            watch(self.folder / f"{run}-{rank}.windows", acts, step)

        logs = [self.folder / f"{run}-{rank}.log" for rank in range(ranks)]
        pids = [start_rank(log, r, ranks, port, prepare, argv) for r, log in enumerate(logs)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        windows: dict[int, list[int]] = {}
        for rank in range(ranks):
            seen = self.folder / f"{run}-{rank}.windows"
            for line in seen.read_text().splitlines() if seen.exists() else []:
                number, ids = json.loads(line)
                windows.setdefault(number, []).extend(ids)
        saved = complete_checkpoints(self.folder / run / "checkpoints")
        return {
            "codes": codes,
            "windows": {number: sorted(ids) for number, ids in windows.items()},
            "newest": saved[-1].name if saved else None,
            "reduced": (self.folder / f"{run}-0.reduced").stat().st_size,
            "files": sorted(p.name for p in saved[-1].iterdir()) if saved else [],
            "log": logs[0].read_text()[-5000:],
        }

    def copy(self, run: str, *names: str) -> None:
        for name in names:
            shutil.copytree(self.folder / run, self.folder / name)


def raising(number: int) -> Act:
    return lambda module: os.kill(os.getpid(), number)


def poison(module: PretrainModule) -> None:
    layer: Any = module.model.model.layers[1].mlp.up_proj
    layer.register_forward_hook(lambda *args: args[2].index_fill(-1, torch.tensor([3]), torch.inf))


def die_in_save(module: PretrainModule) -> None:
    """When this rank next writes its shards, it is killed on the way."""

    def write(tensors: Any, folder: Path) -> None:
        (folder / "__1_0.distcp").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    sharded.write_tensors = write


def init_from(folder: Path) -> None:
    """A model whose rope, eps and activation are not LlamaConfig's, and a run that begins so."""
    plain = yaml.safe_load(INIT)
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**plain["model"]["llama"], initializer_range=0.3))
    model.save_pretrained(folder / "source")
    plain["model"]["init_from"] = str(folder / "source")
    (folder / "init.yaml").write_text(yaml.safe_dump(plain))


def scenarios(folder: Path, tokens: Path) -> dict[str, Any]:
    """In their order: some go on from what an earlier one left."""
    torch.set_num_threads(1)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "plain.yaml").write_text(CONFIG.replace("dropout: 0.1", "dropout: 0"))
    (folder / "memory.yaml").write_text(MEMORY)
    run, stop = Runs(folder, tokens), raising(signal.SIGTERM)
    results = {"whole": run("whole"), "sigterm rank 1": run("two", act=stop)}
    run.copy("two", "sharded")
    results["resumed on 2"] = run("two")
    results["sigterm rank 1, fsdp2"] = run("sharded", "fsdp2", stop, step=5)
    run.copy("sharded", "one", "full")
    results["resumed on 1"] = run("one", "auto")
    results["sharded to full"] = run("full")
    results["killed in its save"] = run("sharded", "fsdp2", die_in_save, step=6)
    results["resumed, fsdp2"] = run("sharded", "fsdp2")
    for strategy in ("ddp", "fsdp2"):
        results[f"nan rank 1, {strategy}"] = run(f"nan-{strategy}", strategy, poison)
    measure = measure_memory(folder / "memory.bytes")
    results["memory"] = run("memory", "fsdp2", measure, step=2, config="memory.yaml")
    init_from(folder)
    for strategy in ("auto", "ddp", "fsdp2"):
        results[f"init_from, {strategy}"] = run(f"init-{strategy}", strategy, config="init.yaml")
    for way in ("native", "fp32"):
        for strategy in ("auto", "ddp", "fsdp2"):
            name = f"{way}-{strategy}"
            results[name] = run(name, strategy, config="plain.yaml", way=way)
    results["kill rank 1"] = run("kill", act=raising(signal.SIGKILL))
    return results


if __name__ == "__main__":
    results = scenarios(Path(sys.argv[1]), Path(sys.argv[2]))
    (Path(sys.argv[1]) / "results.json").write_text(json.dumps(results))
