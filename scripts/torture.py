"""Kills and I/O faults at seeded random moments; what goes on must end as if nothing had been.

    python scripts/torture.py --trials 100 --seed 0

A trial is a tiny run with all that could go wrong (dropout, stochastic rounding, two micro-batches
a step, a checkpoint every step; every fifth of them with phases, activation checkpointing, the
integer backend or the microscope), or another verb that writes. It is started with one fault after
another: SIGKILL at a moment of the clock; or at its n-th file call SIGKILL before, after or within
it, a disk that is full for some calls (ENOSPC), EIO, a short write; on any rank. After each start
run.json must be true and no line a traceback; ranks that are left end by themselves. The last start
has no fault: every number, weight, moment, generator and file is compared bit for bit with
what was never disturbed. Exit code 1 where they differ. `--only N` does trial N of a seed again.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults import ACTIONS, KILLS, Block, Fault, with_shim

PATIENCE = 60.0  # seconds that a rank may outlive another
FAULTS = 4  # of a trial
CLOCK = "kill at a time"
WEIGHTS = {CLOCK: 6, "kill before": 1, "kill within": 2, "kill after": 1} | {
    "ENOSPC": 1, "EIO": 1, "short write": 1,
}  # fmt: skip


@dataclass
class Tally:
    """What was done to a kind of job, and what it left."""

    done: Counter[str] = field(default_factory=Counter)
    trials: int = 0
    equal: int = 0  #: faults of trials that ended bit for bit as undisturbed
    slowest: float = 0.0  #: seconds that a rank outlived another

    def row(self, name: str) -> str:
        kills = sum(self.done[kind] for kind in (CLOCK, *KILLS))
        calls = "/".join(str(self.done[kind]) for kind in KILLS)
        faults = " | ".join(str(self.done[kind]) for kind in ("ENOSPC", "EIO", "short write"))
        outlived = f"{self.slowest:.1f} s" if self.slowest else "-"
        whole = sum(self.done.values())
        return (
            f"| {name} | {self.trials} | {kills} ({self.done[CLOCK]}; {calls}) | {faults} | "
            f"{self.equal} of {whole} | {outlived} |"
        )


HEADER = (
    "| job | trials | kills (by the clock; before/within/after a call) | ENOSPC | EIO | short write"
    " | bit-equal | longest that a rank outlived another |\n|---|---|---|---|---|---|---|---|"
)


class Torture:
    """Trials of one seed, in a folder of their own."""

    def __init__(self, seed: int, folder: Path, jobs: list[str]) -> None:
        self.seed, self.folder, self.jobs = seed, folder, jobs
        self.tallies: dict[str, Tally] = {}
        self.whole: dict[tuple[str, str], tuple[Any, int, float]] = {}
        self.failures: list[str] = []

    def undisturbed(self, job: Any) -> tuple[Any, int, float]:
        """The job's like that nothing happens to: with the file calls of its ranks, and seconds."""
        key = (job.name, job.variant)
        if key not in self.whole:
            like = job.like()
            like.begin(self.folder / "whole" / f"{job.name}-{job.variant}")
            block = Block.make(self.folder / "whole.block", like.folder)
            began = time.monotonic()
            codes, _ = self.ended(like.start(block, 0))
            if any(codes):
                raise RuntimeError(f"{key}: {codes}\n{(like.folder / 'log').read_text()[-2000:]}")
            self.whole[key] = like, block.get("calls"), time.monotonic() - began
        return self.whole[key]

    @staticmethod
    def ended(children: list[int]) -> tuple[list[int], float]:
        from torture_runs import ended

        return ended(children, PATIENCE)

    def trial(self, number: int) -> None:
        """One of them, the same at every call."""
        choice = random.Random(self.seed * 1_000_003 + number)
        job = self.job(choice)
        whole, calls, seconds = self.undisturbed(job)
        place = self.folder / f"trial-{number}"
        job.begin(place)
        block = Block.make(self.folder / "block", place)
        tally = self.tallies.setdefault(job.name, Tally())
        story, done, problems = [], Counter[str](), list[str]()
        for _ in range(FAULTS):
            kind, line, codes, longest = self.strike(job, block, choice, calls, seconds)
            story.append(line)
            if kind is not None:
                done[kind] += 1
                tally.slowest = max(tally.slowest, longest if job.ranks > 1 else 0)
            problems += self.wrong(job, codes, kind)
            if problems or not any(codes):
                break  # it is done
        if not problems:
            block.set(action=0)
            codes, _ = self.ended(job.start(block, 0))
            by_io = bool(done.keys() - {CLOCK, *KILLS})
            problems += [f"the last start ended with {codes}"] if any(codes) else []
            problems = problems or job.differences(whole, by_io=by_io)
        tally.trials += 1
        tally.done += done
        tally.equal += 0 if problems else sum(done.values())
        outcome = "bit-equal" if not problems else f"FAILED {'; '.join(problems)[:600]}"
        print(
            f"trial {number} ({job.name}, {job.variant}): {'; '.join(story)}: {outcome}", flush=True
        )
        if problems:
            self.failures.append(f"--seed {self.seed} --only {number}")
            print((place / "log").read_text(errors="replace")[-1500:], flush=True)
        else:
            shutil.rmtree(place)

    def job(self, choice: random.Random) -> Any:
        """By lot, as often as its weight says."""
        from torture_runs import STRATEGIES, VARIANTS, Training
        from torture_verbs import VERBS

        name = choice.choice(self.jobs)
        if name in STRATEGIES:
            variant = choice.choice(["plain"] * 4 + [*VARIANTS])
            if (name, variant) == ("fsdp2", "microscope"):
                variant = "plain"  # FSDP2 has no microscope
            inputs = self.folder / "inputs"
            return Training(name, variant, inputs / "tokens", inputs / "config.yaml")
        return VERBS[name](self.folder)

    def strike(
        self, job: Any, block: Block, choice: random.Random, calls: int, seconds: float
    ) -> tuple[str | None, str, list[int], float]:
        """Start it with a fault: the kind, None where it had ended before; a line, exit codes."""
        kind = choice.choices([*WEIGHTS], [*WEIGHTS.values()])[0]
        rank, share = choice.randrange(job.ranks), choice.random()
        block.set(action=0, calls=0, done=0)
        who = f" of rank {rank}" if job.ranks > 1 else ""
        if kind == CLOCK:
            delay = share * seconds * 0.8
            children = job.start(block, rank)
            time.sleep(delay)
            os.kill(children[rank], signal.SIGKILL)  # a zombie of ours, at worst
            line = f"kill{who} after {delay:.2f} s"
        else:
            fault = Fault(kind, 1 + int(share**1.5 * calls * 0.8))
            block.arm(fault)
            children = job.start(block, rank)
            line = f"{fault}{who}"
        codes, longest = self.ended(children)
        is_hit = codes[rank] == -signal.SIGKILL if kind in (CLOCK, *KILLS) else block.get("done")
        return kind if is_hit else None, f"{line} -> {codes}", codes, longest

    def wrong(self, job: Any, codes: list[int], kind: str | None) -> list[str]:
        """What a start left that is not so, or nobody's words."""
        found = [f"exit codes {codes}"] if not {*codes} <= {0, 2, -signal.SIGKILL} else []
        log = job.folder / "log"
        if log.exists() and "Traceback" in log.read_text(errors="replace"):
            found.append("a traceback")
        found += job.untrue(codes, kind in ACTIONS.keys() - {*KILLS})
        return found

    def table(self) -> str:
        """All that was done."""
        whole = Tally()
        for tally in self.tallies.values():
            whole.done += tally.done
            whole.trials, whole.equal = whole.trials + tally.trials, whole.equal + tally.equal
            whole.slowest = max(whole.slowest, tally.slowest)
        rows = [tally.row(name) for name, tally in sorted(self.tallies.items())]
        return "\n".join([HEADER, *rows, whole.row("all")])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--jobs", nargs="+", default=["process"] * 4 + ["ddp", "ddp", "fsdp2", "fsdp2"]
    )
    parser.add_argument("--only", type=int, help="this trial alone")
    parser.add_argument("--minutes", type=float, help="begin no trial after that")
    args = parser.parse_args()
    with_shim()
    import torch
    from tiny_run import write_inputs

    torch.set_num_threads(1)  # sums depend on their number
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        torture = Torture(args.seed, Path(name), args.jobs)
        (torture.folder / "inputs").mkdir()
        write_inputs(torture.folder / "inputs")
        began = time.monotonic()
        for number in range(args.trials) if args.only is None else [args.only]:
            if args.minutes and time.monotonic() - began > 60 * args.minutes:
                break
            torture.trial(number)
        print(f"\nseed {args.seed}, {time.monotonic() - began:.0f} s\n\n{torture.table()}")
    print("\n".join(f"FAILED: {failure}" for failure in torture.failures))
    return 1 if torture.failures else 0


if __name__ == "__main__":
    sys.exit(main())
