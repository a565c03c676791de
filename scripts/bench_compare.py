"""Time and peak memory of `lowbit compare` on synthetic runs: 12 x 100,000 steps x 8 metrics.

python scripts/bench_compare.py [--runs 12] [--steps 100000] [--recipes 3]
taskset -c 0 python scripts/bench_compare.py --runs 300 --steps 2000 --recipes 10   issue 28's bar

Each has the config.yaml and the recipe table of a real run, of which its run.json and metrics.csv
are made up. Seconds of the processor are those that it takes alone on a core.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tiny_run import write_inputs

COLUMNS = (
    "step,tokens_seen,train/loss,grad_norm,lr,tokens_per_second,quant/clamped,quant/minus_128,"
    "val/loss,val/perplexity"
)
RECIPES = ("bf16", "mxint8", "mxfp8e4m3", "nvfp4", "nvint4", "mxfp4", "mxint4", "mxfp6", "a", "b")


def template(folder: Path) -> tuple[dict[str, Any], str]:
    """run.json and config.yaml of a run of a step."""
    write_inputs(folder)
    place = ["--data.path", str(folder / "tokens"), "--run_dir", str(folder / "run")]
    call = ["fit", "-c", str(folder / "config.yaml"), *place, "--trainer.max_steps", "1"]
    subprocess.run([sys.executable, "-m", "train.cli", *call], check=True, capture_output=True)
    record = json.loads((folder / "run" / "run.json").read_text())
    for key in ("identity", "metrics", "export", "segments", "starts", "phases"):
        record.pop(key, None)
    return record, (folder / "run" / "config.yaml").read_text()


def write_run(
    folder: Path, recipe: str, seed: int, steps: int, known: tuple[dict[str, Any], str]
) -> None:
    rng = np.random.default_rng([seed, len(recipe)])
    folder.mkdir()
    loss = 3 + 5 * np.exp(-np.arange(steps) / steps * 20) + rng.normal(0, 0.05, steps)
    others = rng.random((5, steps))
    with (folder / "metrics.csv").open("w") as file:
        file.write(COLUMNS + "\n")
        for i in range(steps):
            cells = [i + 1, (i + 1) * 256, float(loss[i]), *map(float, others[:, i])]
            val = [float(loss[i]), float(np.exp(loss[i]))] if (i + 1) % 500 == 0 else ["", ""]
            file.write(",".join(map(repr, cells)) + "," + ",".join(map(str, val)) + "\n")
    record, config = known
    info = record | {
        "recipe": recipe, "seed": seed, "data": record["data"] | {"seed": seed},
        "initial_weights": f"w{seed}", "max_steps": steps,
        "recipe_table": json.loads(json.dumps(record["recipe_table"]).replace("mxint8", recipe)),
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(info))
    config = re.sub(r"(?m)^seed_everything: .*", f"seed_everything: {seed}", config)
    config = re.sub(r"(?m)^(  seed: ).*", rf"\g<1>{seed}", config)
    config = re.sub(r"(?m)^(  max_steps: ).*", rf"\g<1>{steps}", config)
    config = re.sub(r"(?m)^(    name: )stochastic", rf"\g<1>{recipe}", config)
    (folder / "config.yaml").write_text(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--recipes", type=int, default=3, help="at most 10")
    args = parser.parse_args()
    recipes = RECIPES[: args.recipes]
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as place:
        known = template(Path(place))
        for i in range(args.runs):
            recipe, seed = recipes[i % len(recipes)], i // len(recipes)
            write_run(Path(name) / f"{recipe}-s{seed}", recipe, seed, args.steps, known)
        size = sum(file.stat().st_size for file in Path(name).glob("*/metrics.csv"))
        start = time.perf_counter()
        with subprocess.Popen([sys.executable, "-m", "train.cli", "compare", name]) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        page = (Path(name) / "compare" / "report.html").stat().st_size
    print(f"\n{args.runs} runs x {args.steps:,} steps, metrics.csv {size / 1e6:.0f} MB together:")
    busy = usage.ru_utime + usage.ru_stime
    print(f"{seconds:.1f} s, of the processor {busy:.1f} s, ", end="")
    print(f"peak {usage.ru_maxrss / 2**20:.2f} GiB, report {page / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
