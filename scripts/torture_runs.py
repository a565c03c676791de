"""Training runs for scripts/torture.py: how they start, what must be true of them and their end."""

import csv
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from faults import Block
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.checkpoints.folder import complete_checkpoints, load_state, verify_checkpoint
from train.cli import main
from train.runs.exports import check_export
from train.runs.record import has_record, read_record
from train.runs.run import read_run

VARIANTS = {
    "plain": [],
    "phases": ["--model.policy.phases", "[{start: 0.5, gemms: [fprop]}]"],
    "checkpointing": ["--model.gradient_checkpointing", "true"],
    "integer": ["--model.backend", "integer"],
    "microscope": ["--diagnostics.formats", "[mxfp8]", "--diagnostics.every_n_steps", "2"],
}
STRATEGIES = {"process": ("auto", 1), "ddp": ("ddp", 2), "fsdp2": ("fsdp2", 2)}
STEPS = 8


def forked(
    log: Path,
    call: Sequence[str] | Callable[[], int],
    block: Block | None,
    environment: dict[str, str],
    before: Callable[[], Any] = lambda: None,
) -> int:
    """A child process that runs a verb, or calls; nothing is imported again."""
    child = os.fork()
    if child:
        return child
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= environment
    if block is not None:
        block.attach()
    try:
        before()
        code = call() if callable(call) else main([*call])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 98
    except BaseException as error:
        print(f"Traceback: {error!r}", file=sys.stderr)
        code = 99
    sys.stdout.flush()
    os._exit(code)


def free_port() -> int:
    """Of this machine, a moment ago."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@dataclass
class Training:
    """`lowbit fit` of a tiny model, by one process or two ranks without a launcher."""

    name: str  #: of STRATEGIES
    variant: str
    tokens: Path
    config: Path
    folder: Path = field(default_factory=Path)

    @property
    def ranks(self) -> int:
        return STRATEGIES[self.name][1]

    def like(self) -> "Training":
        """Another of its kind."""
        return Training(self.name, self.variant, self.tokens, self.config)

    def begin(self, folder: Path) -> None:
        """Another run, which there is not yet."""
        folder.mkdir(parents=True)
        self.folder = folder

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def start(self, block: Block | None, rank: int, more: Sequence[str] = ()) -> list[int]:
        """Its processes; `rank` takes part in `block`."""
        strategy, ranks = STRATEGIES[self.name]
        argv = ["fit", "-c", str(self.config), *VARIANTS[self.variant]]
        argv += ["--data.path", str(self.tokens), "--run_dir", str(self.run)]
        argv += ["--trainer.max_steps", str(STEPS), "--trainer.strategy", strategy]
        argv += ["--trainer.devices", str(ranks), *more]
        if ranks == 1:
            return [forked(self.folder / "log", argv, block, {})]
        place = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        place |= {"TORCHELASTIC_RUN_ID": "torture"}
        return [
            forked(
                self.folder / "log",
                argv,
                block if own == rank else None,
                place | {"RANK": str(own), "LOCAL_RANK": str(own)},
            )
            for own in range(ranks)
        ]

    def untrue(self, codes: Sequence[int], by_io: bool) -> list[str]:
        """What run.json says and is not so, after its processes ended with `codes`."""
        if not has_record(self.run):
            return []
        try:
            record = read_record(self.run)
        except ValueError as error:
            return [f"run.json: {error}"]
        status, first = record["status"], codes[0]
        if status == "finished":
            whole = complete_checkpoints(self.run / "checkpoints")[-1].name.endswith(f"{STEPS}")
            exported = (self.run / "hf").is_dir() and check_export(self.run / "hf") is not None
            return [] if whole and exported else ["run.json says finished, and it is not"]
        if status == "failed" and not record.get("error"):
            return ["run.json says failed, and not why"]
        if status == "running" and first >= 0 and not by_io:
            return [f"run.json says running, and rank 0 ended with {first}"]
        return [] if status in ("running", "failed") else [f"run.json says {status}"]

    def differences(self, other: "Training", *, by_io: bool) -> list[str]:
        """What two finished runs do not have in common, by name."""
        read_run(self.run)  # checks run.json, metrics.csv and hf/ against each other
        if read_record(self.run).get("error"):
            return ["run.json of the finished run keeps an error"]
        found = _differing(_rows(self.run), _rows(other.run), "metrics.csv")
        found += _differing(_weights(self.run), _weights(other.run), "hf")
        states = [_last_state(one.run) for one in (self, other)]
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "rng", "callbacks"):
            found += _differing(states[0][part], states[1][part], part)
        events = EventAccumulator(str(self.run)).Reload()
        steps = [event.step for event in events.Scalars("train/loss")]
        expected = sorted(set(steps)) if by_io else list(range(1, STEPS + 1))
        return found + ([] if steps == expected else [f"TensorBoard has train/loss at {steps}"])


def _rows(run: Path) -> list[dict[str, str]]:
    """metrics.csv without the times."""
    with (run / "metrics.csv").open(newline="") as file:
        kept = csv.DictReader(file)
        return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in kept]


def _weights(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "hf").glob("*.safetensors")}


def _last_state(run: Path) -> Any:
    newest = complete_checkpoints(run / "checkpoints")[-1]
    verify_checkpoint(newest)
    return load_state(newest)


def _differing(a: Any, b: Any, where: str) -> list[str]:
    """Names of the leaves that are not equal, through nested containers."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [name for key in a for name in _differing(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [name for i, (x, y) in pairs for name in _differing(x, y, f"{where}.{i}")]
    equal = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if equal else [where]


def ended(children: Sequence[int], limit: float) -> tuple[list[int], float]:
    """Exit codes (-9: killed), and how long the last outlived the first; those that do not end
    within `limit` of it are killed, code None.
    """
    codes: dict[int, int] = {}
    first = None
    while len(codes) < len(children):
        for child in children:
            if child not in codes and (status := os.waitpid(child, os.WNOHANG))[0]:
                codes[child] = os.waitstatus_to_exitcode(status[1])
                first = first or time.monotonic()
        if first and time.monotonic() - first > limit:
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    codes[child] = HUNG
        time.sleep(0.005)
    return [codes[child] for child in children], time.monotonic() - (first or 0)


HUNG = 1000
