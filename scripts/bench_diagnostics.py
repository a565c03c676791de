"""What the microscope costs: `python scripts/bench_diagnostics.py`.

One `lowbit fit` of the quickstart model on generated text and configs/diagnostics/microscope.yaml:
all layers, all operands, two what-if formats, gradients against unquantized ones, every 10 steps.
Seconds of a step are those of metrics.csv, all that the microscope does included. A step that it
looks at is compared with the median of the steps on both sides of it.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from timing import machine

from data.prepare import prepare
from data.request import PrepareRequest
from train.cli import main as lowbit
from train.runs.run import read_run

CONFIGS = Path(__file__).parents[1] / "configs"


def generated_data(folder: Path) -> Path:
    """Random words as prepared bytes: what they say does not change the cost."""
    generator = np.random.default_rng(0)
    words = ["".join(map(chr, generator.integers(97, 123, 6))) for _ in range(500)]
    for index in range(40):
        (folder / f"{index}.txt").write_text(" ".join(generator.choice(words, 4000)))
    prepare(folder / "tokens", PrepareRequest(text=(f"{folder}/*.txt",), tokenizer="bytes"))
    return folder / "tokens"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--recipe", default="mxint8")
    parser.add_argument("--looks", type=int, default=4, help="steps that are looked at")
    parser.add_argument("more", nargs="*", help="after --: further arguments of `lowbit fit`")
    args = parser.parse_args()
    every = 10
    print(machine(torch.device("cpu")))
    files = "model/quickstart", f"recipe/{args.recipe}", "diagnostics/microscope"
    layers = [part for name in files for part in ("-c", str(CONFIGS / f"{name}.yaml"))]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        place = ["--data.path", str(generated_data(Path(folder))), "--run_dir", str(run)]
        steps = ["--trainer.max_steps", str(every * args.looks + every // 2)]
        quiet = ["--trainer.val_check_interval", "10000", "--checkpoint_every", "10000"]
        if lowbit(["fit", *layers, *place, *steps, *quiet, *args.more]):
            raise SystemExit("lowbit fit failed")
        metrics = read_run(run).metrics
    tokens = metrics["tokens_seen"][0]
    seconds = (tokens / metrics["tokens_per_second"]).tolist()
    shares = []
    for look in range(2 * every, len(seconds), every):  # the first builds what later ones reuse
        around = seconds[look - every // 2 - 1 : look - 1] + seconds[look : look + every // 2]
        shares.append((seconds[look - 1] - statistics.median(around)) / statistics.median(around))
    extra = statistics.median(shares)
    print(
        f"{args.recipe}: a step is {statistics.median(seconds):.3f} s; one that is looked at takes "
        f"{extra:.2f} steps more (median of {len(shares)}): {extra / every:.1%} every {every} steps"
        f" with {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
