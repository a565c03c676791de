"""Time and peak memory of `lowbit compare` on synthetic runs: 12 x 100,000 steps x 8 metrics.

python scripts/bench_compare.py [--runs 12] [--steps 100000]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

COLUMNS = (
    "step,tokens_seen,train/loss,grad_norm,lr,tokens_per_second,quant/clamped,quant/minus_128,"
    "val/loss,val/perplexity"
)
COMPARE = (
    "import argparse; from train import compare; parser = argparse.ArgumentParser();"
    " compare.add_arguments(parser); compare.run(parser.parse_args())"
)


def write_run(folder: Path, recipe: str, seed: int, steps: int) -> None:
    rng = np.random.default_rng([seed, len(recipe)])
    folder.mkdir()
    loss = 3 + 5 * np.exp(-np.arange(steps) / steps * 20) + rng.normal(0, 0.05, steps)
    others = rng.random((5, steps))
    with (folder / "metrics.csv").open("w") as file:
        file.write(COLUMNS + "\n")
        for i in range(steps):
            cells = [i + 1, (i + 1) * 4096, float(loss[i]), *map(float, others[:, i])]
            val = [float(loss[i]), float(np.exp(loss[i]))] if (i + 1) % 500 == 0 else ["", ""]
            file.write(",".join(map(repr, cells)) + "," + ",".join(map(str, val)) + "\n")
    data = {"fingerprint": "f", "seq_len": 256, "global_batch_size": 16, "seed": seed}
    info = {
        "format_version": 1, "status": "finished", "recipe": recipe, "seed": seed, "data": data,
        "model": {}, "initial_weights": f"w{seed}", "max_steps": steps,
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(info))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--steps", type=int, default=100_000)
    args = parser.parse_args()
    recipes = ("bf16", "mxint8", "mxfp8e4m3")
    with tempfile.TemporaryDirectory() as name:
        for i in range(args.runs):
            recipe, seed = recipes[i % 3], i // 3
            write_run(Path(name) / f"{recipe}-s{seed}", recipe, seed, args.steps)
        size = sum(file.stat().st_size for file in Path(name).glob("*/metrics.csv"))
        start = time.perf_counter()
        with subprocess.Popen([sys.executable, "-c", COMPARE, name]) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        page = (Path(name) / "compare" / "report.html").stat().st_size
    print(f"\n{args.runs} runs x {args.steps:,} steps, metrics.csv {size / 1e6:.0f} MB together:")
    print(f"{seconds:.1f} s, peak {usage.ru_maxrss / 2**20:.2f} GiB, report {page / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
