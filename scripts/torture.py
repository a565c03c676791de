"""Kill a training run with SIGKILL at seeded random moments; it must end as if nothing had been.

    python scripts/torture.py --kills 25 --seed 0

A tiny model with all that could go wrong: dropout, two micro-batches a step, stochastic rounding, a
checkpoint every step, validation. Each kill waits for the n-th beginning of a micro-batch, a save
or a validation of its process, and then a part of that one's duration. At the end every logged
number but the times, the weights, the optimizer and the generators are compared bit for bit with
the uninterrupted run, and TensorBoard must hold each step once. Exit code 1 where they differ.
"""

import argparse
import csv
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.prepare import prepare
from data.request import PrepareRequest
from train.checkpoints.folder import (
    AtomicCheckpointIO,
    complete_checkpoints,
    load_state,
    verify_checkpoint,
)
from train.fit.fit import fit
from train.model.module import PretrainModule

EVENTS = {"m": "micro-batch", "s": "save", "v": "validation"}
STOCHASTIC = "{name: mxint8, rounding: stochastic}"
CONFIG = f"""
model:
  llama: {{hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4,
    num_key_value_heads: 2, vocab_size: 320, max_position_embeddings: 64, attention_dropout: 0.1}}
  optimization: {{lr: 1.0e-2, warmup_steps: 2}}
  policy:
    name: stochastic
    recipe: {{fprop_input: mxint8, fprop_weight: mxint8, dgrad_weight: mxint8, wgrad_input: mxint8,
      dgrad_grad_output: {STOCHASTIC}, wgrad_grad_output: {STOCHASTIC}}}
data: {{seq_len: 32, global_batch_size: 8, val_windows: 8}}
trainer: {{accelerator: cpu, accumulate_grad_batches: 2, val_check_interval: 3}}
checkpoint_every: 1
"""


def run(folder: Path, max_steps: int, name: str, events: int | None = None) -> int:
    """A child process that trains; it says on the pipe `events` what it begins."""
    child = os.fork()  # nothing is imported again: a start takes a second, not ten
    if child:
        return child
    log = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if events is not None:
        announce(PretrainModule, "training_step", lambda: os.write(events, b"m"))
        announce(PretrainModule, "validation_step", lambda: os.write(events, b"v"))
        announce(AtomicCheckpointIO, "save_checkpoint", lambda: os.write(events, b"s"))
    arguments = ["--data.path", str(folder / "tokens"), "--run_dir", str(folder / name)]
    steps = ["--trainer.max_steps", str(max_steps)]
    try:
        code = fit(["-c", str(folder / "config.yaml"), *arguments, *steps])
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        code = 99
    os._exit(code)


def announce(owner: Any, method: str, say: Callable[[], Any]) -> None:
    """Have `say` called whenever the method begins."""
    original = getattr(owner, method)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        say()
        return original(*args, **kwargs)

    setattr(owner, method, wrapped)


def kill_once(folder: Path, max_steps: int, choice: random.Random, number: int) -> bool:
    """Start the run and kill it; False where it ended before its moment came."""
    event = choice.choice("msv")
    count = choice.randint(1, {"m": 6, "s": 3, "v": 2}[event])
    delay = choice.uniform(0, {"m": 0.05, "s": 0.02, "v": 0.03}[event])
    reading, writing = os.pipe()
    child = run(folder, max_steps, "killed", writing)
    os.close(writing)
    seen = 0
    while seen < count and (byte := os.read(reading, 1)):
        seen += byte == event.encode()
    os.close(reading)
    if seen == count:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    saved = complete_checkpoints(folder / "killed" / "checkpoints")
    killed = os.WIFSIGNALED(status)
    print(
        f"kill {number}: {EVENTS[event]} {count} + {delay * 1000:.1f} ms, "
        f"{'killed' if killed else f'had ended with {os.WEXITSTATUS(status)}'}; "
        f"newest {saved[-1].name if saved else 'none'}",
        flush=True,
    )
    return killed


def differences(a: Path, b: Path, max_steps: int) -> list[str]:
    """What two runs do not have in common, by name."""
    found = [
        f"metrics.csv of step {left.get('step')}: {left} and {right}"
        for left, right in zip(rows(a), rows(b), strict=True)
        if left != right
    ]
    states = []
    for folder in (a, b):
        newest = complete_checkpoints(folder / "checkpoints")[-1]
        verify_checkpoint(newest)
        states.append(load_state(newest))
        events = EventAccumulator(str(folder)).Reload()
        steps = [event.step for event in events.Scalars("train/loss")]
        if steps != list(range(1, max_steps + 1)):
            found.append(f"TensorBoard of {folder.name} has train/loss at {steps}")
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "rng", "callbacks"):
        found += differing(states[0][part], states[1][part], part)
    return found


def rows(folder: Path) -> list[dict[str, str]]:
    """metrics.csv without the times."""
    with (folder / "metrics.csv").open(newline="") as file:
        kept = csv.DictReader(file)
        return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in kept]


def differing(a: Any, b: Any, where: str) -> list[str]:
    """Names of the leaves that are not equal, through nested containers."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [name for key in a for name in differing(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [name for i, (x, y) in pairs for name in differing(x, y, f"{where}.{i}")]
    equal = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if equal else [where]


def wait(child: int) -> int:
    """The exit code of a child that was not killed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def prepare_folder(folder: Path) -> None:
    """Tokens of a text that needs no download, and the configuration."""
    for index in range(20):
        lines = (f"{index} times {n} is {index * n}, as every child knows." for n in range(40))
        (folder / f"{index}.txt").write_text("\n".join(lines))
    text = PrepareRequest(text=(f"{folder}/*.txt",), tokenizer="bytes", val_fraction=0.2)
    prepare(folder / "tokens", text)
    (folder / "config.yaml").write_text(CONFIG)


def torture(kills: int, seed: int, max_steps: int) -> int:
    """Reference run, kills, last run, comparison."""
    torch.set_num_threads(1)  # sums depend on their number
    choice = random.Random(seed)
    print(f"{kills} kills, seed {seed}, {max_steps} steps", flush=True)
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        folder = Path(name)
        prepare_folder(folder)
        began = time.perf_counter()
        code = wait(run(folder, max_steps, "whole"))
        print(f"uninterrupted: exit code {code}, {time.perf_counter() - began:.1f} s", flush=True)
        if code:
            print((folder / "whole.log").read_text()[-2000:])
            return 1
        done = 0
        while done < kills:
            if not kill_once(folder, max_steps, choice, done + 1):
                print((folder / "killed.log").read_text()[-2000:])
                return 1
            done += 1
        last = wait(run(folder, max_steps, "killed"))
        print(f"the last start: exit code {last}; {time.perf_counter() - began:.1f} s in all")
        if code or last:
            print((folder / "killed.log").read_text()[-2000:])
            return 1
        found = differences(folder / "whole", folder / "killed", max_steps)
    print("\n".join(found) or "bitwise equal: losses, weights, optimizer, generators")
    return 1 if found else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: 3 a kill and 4 more")
    args = parser.parse_args()
    sys.exit(torture(args.kills, args.seed, args.steps or 3 * args.kills + 4))
