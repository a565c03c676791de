"""What saving costs of training, and what a resumed start costs of a fresh one.

    python scripts/bench_checkpoint.py [--model configs/model/quickstart.yaml] [--steps 5]

Each start is a fork of one process, so the imports, equal for both, are timed apart and added. The
share of saving is (one save) / (50 steps): one checkpoint per 50 steps.
"""

import argparse
import hashlib
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from data.prepare import prepare
from data.request import PrepareRequest
from train.fit.fit import fit
from train.fit.saving import Checkpoints
from train.loggers.metrics_csv import MetricsCsv
from train.model.module import PretrainModule
from train.runs.metrics import HEADER, Mark

CONFIGS = Path(__file__).parents[1] / "configs"
EVERY = 50


def timed(owner: Any, method: str, out: Path) -> None:
    """Append begin and end of each call, in seconds since the machine started."""
    original = getattr(owner, method)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        began = time.monotonic()
        result = original(*args, **kwargs)
        with out.open("a") as file:
            file.write(f"{method} {began} {time.monotonic()}\n")
        return result

    setattr(owner, method, wrapped)


def start(folder: Path, model: Path, run: str, steps: int) -> dict[str, list[tuple[float, float]]]:
    """Train in a child; when it began, and its timed calls by name."""
    out = folder / "times"
    out.unlink(missing_ok=True)
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        log = os.open(folder / f"{run}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        timed(PretrainModule, "training_step", out)
        timed(PretrainModule, "configure_gradient_clipping", out)
        timed(Checkpoints, "save", out)
        trainer, recipe = CONFIGS / "trainer/quickstart.yaml", CONFIGS / "recipe/bf16.yaml"
        layers = [part for path in (model, trainer, recipe) for part in ("-c", str(path))]
        own = ["--data.path", str(folder / "tokens"), "--run_dir", str(folder / run)]
        limits = ["--trainer.max_steps", str(steps), "--checkpoint_every", "1"]
        os._exit(fit([*layers, *own, *limits, "--trainer.val_check_interval", "1000000"]))
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise RuntimeError((folder / f"{run}.log").read_text()[-3000:])
    found: dict[str, list[tuple[float, float]]] = {"start": [(began, began)]}
    for line in out.read_text().splitlines():
        name, begin, end = line.split()
        found.setdefault(name, []).append((float(begin), float(end)))
    return found


def first_step(found: dict[str, list[tuple[float, float]]]) -> float:
    """From the start to the beginning of the first step."""
    return found["training_step"][0][0] - found["start"][0][0]


def bench(model: Path, steps: int, repeats: int) -> None:
    """Print both figures."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-") as name:
        folder = Path(name)
        text = "\n".join(f"{a} times {b} is {a * b}." for a in range(300) for b in range(100))
        for index in range(20):
            (folder / f"{index}.txt").write_text(text[index * 20_000 : (index + 2) * 20_000])
        prepare(folder / "tokens", PrepareRequest(text=(f"{folder}/*.txt",), tokenizer="bytes"))
        fresh, resumed = [], []
        for repeat in range(repeats):
            found = start(folder, model, f"run{repeat}", steps)
            fresh.append(first_step(found))
            resumed.append(first_step(start(folder, model, f"run{repeat}", steps + 1)))
        ends = [end for _, end in found["configure_gradient_clipping"]]
        saves = [end - begin for begin, end in found["save"] if end - begin > 1e-3]
        state = next((folder / "run0" / "checkpoints").glob("step-*")) / "state.ckpt"
        size = state.stat().st_size
    save = statistics.median(saves)
    step = statistics.median(b - a for a, b in itertools.pairwise(ends)) - save
    share = save / (EVERY * step)
    imports = statistics.median(import_seconds() for _ in range(3))
    starts = [statistics.median(found) for found in (fresh, resumed)]
    bare, ratio = starts[1] / starts[0], (imports + starts[1]) / (imports + starts[0])
    print(f"a step {step:.3f} s, a save {save:.3f} s of {size / 1e6:.0f} MB")
    print(f"saving once per {EVERY} steps: {share:.2%} of training (at most 5 %)")
    print(
        f"start to first step: imports {imports:.2f} s, then fresh {starts[0]:.2f} s, resumed "
        f"{starts[1]:.2f} s: ratio {ratio:.3f} (at most 1.15), without the imports {bare:.3f}"
    )


def bench_rows(counts: list[int]) -> None:
    """What a resume does with the rows of metrics.csv before it: check their hash, cut, go on."""
    for count in counts:
        with tempfile.TemporaryDirectory(prefix="bench-rows-") as name:
            path = Path(name) / "metrics.csv"
            cells = (
                f"{i},{i * 4096},{3 + 1 / i!r},1.0{i % 997},0.001,{1000.1 + i % 89!r},0.0,0.0,,,\n"
                for i in range(1, count + 1)
            )
            path.write_bytes(HEADER + "".join(cells).encode())
            data = path.read_bytes()
            last = data.rfind(b"\n", 0, len(data) - 1) + 1
            mark = Mark(
                HEADER.decode(), last, hashlib.sha256(data[:last]).hexdigest(), data[last:].decode()
            )
            began, busy = time.perf_counter(), time.process_time()
            wrong = mark.check(path.read_bytes())
            log = MetricsCsv(Path(name), count)
            log.log_metrics({"train/loss": 1.0}, count + 1)
            log.finalize("success")
            took, busy = time.perf_counter() - began, time.process_time() - busy
            assert wrong is None and path.read_bytes().startswith(data)
        megabytes = len(data) / 1e6
        print(f"{count:,} rows ({megabytes:.1f} MB): {took:.2f} s, of the processor {busy:.2f} s")


def import_seconds() -> float:
    """Of `lowbit fit`, in a new process."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-P", "-c", "import train.fit.fit"], check=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=CONFIGS / "model/quickstart.yaml")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="+", help="only this: a resume with so many rows")
    args = parser.parse_args()
    if args.rows:
        bench_rows(args.rows)
    else:
        bench(args.model, args.steps, args.repeats)
