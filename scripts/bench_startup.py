"""How long a user waits: `lowbit --help`, `lowbit formats`, and `lowbit fit` to its first step.

usage: python scripts/bench_startup.py [DATA]      (DATA: a prepared folder, for fit)
"""

import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"
LOWBIT = [sys.executable, "-P", "-m", "train.cli"]


def seconds(command: list[str], until: Path | None = None) -> float:
    """Wall time of the command, or until the file holds its second line."""
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            if until and until.exists() and until.read_text().count("\n") >= 2:
                break
            time.sleep(0.01)
        elapsed = time.perf_counter() - began
    return elapsed


def main() -> None:
    print(f"{platform.machine()}, Python {platform.python_version()}, median of 5 (fit: of 3)")
    for arguments in (["--help"], ["formats"]):
        times = [seconds([*LOWBIT, *arguments]) for _ in range(6)][1:]
        print(f"lowbit {arguments[0]:10} {statistics.median(times):6.2f} s")
    if len(sys.argv) > 1:
        layers = ("model/quickstart", "trainer/quickstart", "recipe/mxint8")
        config = [part for layer in layers for part in ("-c", str(CONFIGS / f"{layer}.yaml"))]
        times = []
        for _ in range(3):
            with tempfile.TemporaryDirectory() as folder:
                steps = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2"]
                place = ["--data.path", sys.argv[1], "--run_dir", f"{folder}/run"]
                command = [*LOWBIT, "fit", *config, *steps, *place]
                times.append(seconds(command, Path(folder) / "run" / "metrics.csv"))
        print(f"lowbit fit to its first step {statistics.median(times):6.2f} s")


if __name__ == "__main__":
    main()
