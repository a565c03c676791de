"""SIGKILL of a rank before or while the two meet, no launcher: the other ends, and says so.

    python scripts/rendezvous.py --kills 50 --seed 0

Each kill comes at a random moment of the first part of a start, mostly before the process group is
there. The other rank must end within 60 s of the kill, or of its own start, with exit code 2 and a
line that names who is missing. Exit code 1 where one does not.
"""

import argparse
import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from tiny_run import write_inputs
from torture_runs import HUNG, Training, ended

LIMIT = 60.0  # seconds
AT_ONCE = 5
SAID = r"rank {0} did not come|ranks? {0}\b|rank {1} lost another rank"


def kill(jobs: list[tuple[Training, int, float]], arguments: list[str]) -> list[str]:
    """Start all, kill one rank of each at its moment; what the others did wrong."""
    children = [job.start(None, 0, arguments) for job, _, _ in jobs]
    began = time.monotonic()
    for index in sorted(range(len(jobs)), key=lambda index: jobs[index][2]):
        time.sleep(max(0.0, began + jobs[index][2] - time.monotonic()))
        os.kill(children[index][jobs[index][1]], signal.SIGKILL)
    problems = []
    for (job, rank, delay), own in zip(jobs, children, strict=True):
        codes, _ = ended(own, LIMIT)
        log = (job.folder / "log").read_text(errors="replace")
        code, outlived = codes[1 - rank], time.monotonic() - began - delay
        is_said = re.search(SAID.format(rank, 1 - rank), log) is not None
        wrong = code != 2 or codes[rank] != -signal.SIGKILL or not is_said or code == HUNG
        said = "it did not say who is missing" if not is_said else "named"
        line = f"rank {rank} killed after {delay:.2f} s: the other ended with {code}, {said}"
        print(f"{line}, at most {outlived:.1f} s later", flush=True)
        problems += [f"{line}\n{log[-800:]}"] if wrong else []
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--within", type=float, default=4.0, help="seconds of a start")
    parser.add_argument("--patience", type=int, default=40, help="--rendezvous_timeout")
    args = parser.parse_args()
    torch.set_num_threads(1)
    choice, problems = random.Random(args.seed), list[str]()
    with tempfile.TemporaryDirectory(prefix="rendezvous-") as name:
        tokens, config = write_inputs(Path(name))
        for first in range(0, args.kills, AT_ONCE):
            jobs = []
            for number in range(first, min(first + AT_ONCE, args.kills)):
                job = Training("ddp", "plain", tokens, config)
                job.begin(Path(name) / f"{number}")
                jobs.append((job, choice.randrange(2), choice.uniform(0, args.within)))
            problems += kill(jobs, ["--rendezvous_timeout", str(args.patience)])
    print(f"{args.kills} kills, seed {args.seed}: {len(problems)} wrong")
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
