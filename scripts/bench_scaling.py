"""DDP of two processes with one thread each, against one process with two threads.

    python scripts/bench_scaling.py DATA [--model configs/model/quickstart.yaml] [--steps 12]

DATA is a prepared folder. The same model, recipe and global batch; runs alternate. The speed of a
run is the median of metrics.csv's tokens per second, its first steps left out.
"""

import argparse
import csv
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"
WARM_UP = 3
BOUND = 0.85


def tokens_per_second(args: argparse.Namespace, processes: int, run: Path) -> float:
    """Median over the steps of one run; each process has 2 / `processes` threads."""
    layers = (args.model, CONFIGS / "trainer/quickstart.yaml", args.recipe)
    command = [sys.executable, "-P", "-m", "train.cli", "fit"]
    command += [part for path in layers for part in ("-c", str(path))]
    command += ["--data.path", str(args.data), "--run_dir", str(run)]
    command += ["--trainer.max_steps", str(args.steps), "--data.val_windows", "1"]
    command += ["--trainer.accelerator", "cpu", "--trainer.devices", str(processes)]
    command += ["--trainer.accumulate_grad_batches", str(args.micro_batches // processes)]
    command += ["--trainer.strategy", "auto" if processes == 1 else args.strategy]
    environment = os.environ | {"OMP_NUM_THREADS": str(2 // processes)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    with (run / "metrics.csv").open(newline="") as file:
        speeds = [float(row["tokens_per_second"]) for row in csv.DictReader(file)]
    return statistics.median(speeds[WARM_UP:])


def main() -> None:
    """Print both speeds and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", type=Path, default=CONFIGS / "model/quickstart.yaml")
    parser.add_argument("--recipe", type=Path, default=CONFIGS / "recipe/bf16.yaml")
    parser.add_argument("--strategy", choices=("ddp", "fsdp2"), default="ddp")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--micro_batches", type=int, default=2, help="of a step, over all ranks")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    speeds: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory(prefix="bench-scaling-") as folder:
        for repeat in range(args.repeats):
            for processes in (1, 2):
                run = Path(folder) / f"{processes}-{repeat}"
                speeds[processes].append(tokens_per_second(args, processes, run))
    one, two = (statistics.median(speeds[processes]) for processes in (1, 2))
    print(f"{platform.machine()}, {args.model.stem}, {args.recipe.stem}, {args.strategy}")
    print(f"one process, two threads {one:,.0f} tokens/s; two processes, one each {two:,.0f}")
    print(f"ratio {two / one:.3f} (at least {BOUND})")


if __name__ == "__main__":
    main()
