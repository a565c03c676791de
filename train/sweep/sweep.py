"""`lowbit sweep`: the same run under several recipes, overrides and seeds, each its own process."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from train.compare.gaps import compare_pair
from train.compare.stopping import Stopping, write_stopping
from train.runs.belonging import run_identity
from train.runs.casts import CastGap, read_cast_gaps, write_cast_gaps
from train.runs.folders import check_run_folder, check_sweep_folder
from train.runs.record import has_record, read_record, run_status
from train.runs.run import Run, read_run
from train.sweep.processes import Launcher, fit_command
from train.sweep.request import PlannedRun, SweepRequest, read_request
from train.sweep.status import status_table
from train.sweep.target import FIRST_STAGE, check_target, second_stage

ENDED = ("finished", "diverged")  # a rerun changes neither


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.description = (
        "Run recipes x overrides x seeds; what is done is skipped, what was stopped goes on."
        " Exit codes: 0 done, 1 a run failed, 2 refused, 3 a run diverged (both: 1),"
        " 130 / 138 / 143 stopped by SIGINT / SIGUSR1 / SIGTERM with checkpoints saved."
    )
    parser.add_argument(
        "--spec", type=Path, help="YAML: out, config, recipes, seeds, overrides, settings"
    )
    parser.add_argument("--out", type=Path, help="folder of the run folders")
    parser.add_argument(
        *("-c", "--config"), type=Path, action="append", help="YAML of model and trainer"
    )
    parser.add_argument(
        "--recipes", type=Path, nargs="+", help="recipe YAMLs; the first is the baseline"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="so many at a time")
    parser.add_argument(
        "--task", type=int, metavar="I",
        help="only run I of the table (from 0), in this process: for SLURM arrays",
    )  # fmt: skip
    parser.add_argument("--status", action="store_true", help="print the table and end")
    branches = parser.add_argument_group("branches: short continuations of a run's checkpoints")
    branches.add_argument("--branch-from", type=Path, nargs="+", metavar="CHECKPOINT")
    branches.add_argument("--horizon", type=int, metavar="H", help="steps of a branch")
    branches.add_argument("--branches", type=int, metavar="B", help="of each checkpoint, at most")
    branches.add_argument(
        "--casts", action="store_true",
        help="evaluate the checkpoints' weights under every recipe too: loss and KL of the casts",
    )  # fmt: skip
    parser.add_argument(
        "--target-se", type=float, metavar="X",
        help="run as many seeds (branches) as this standard error of every mean gap takes, as"
        f" told by the first {FIRST_STAGE}; at most those planned",
    )  # fmt: skip
    parser.add_argument("arguments", nargs="*", help="after --: further arguments of `lowbit fit`")


def run(args: argparse.Namespace) -> int:
    """Run what has not ended, then evaluate the cast gaps."""
    if args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs}: at least 1")
    if args.branch_from:
        from train.sweep.branches import run_branches

        return run_branches(args)
    if args.horizon is not None or args.branches is not None or args.casts:
        raise ValueError("--horizon, --branches and --casts belong to --branch-from CHECKPOINT")
    request = read_request(args)
    plan = request.runs()
    check_sweep_folder(request.out)
    for planned in plan:
        check_run_folder(planned.folder)
    if args.status:
        print(status_table(plan, args.jobs))
        return 0
    if args.task is not None:
        return _become(request, plan, args.task)
    from lowbit.bf16 import products  # torch takes its time, which no --status should wait for

    products()  # a typo in the environment is said before anything runs
    return _run_all(request, plan, args)


def _become(request: SweepRequest, plan: list[PlannedRun], task: int) -> int:
    """This process turns into run `task`: signals, requeueing and exit codes are those of fit."""
    if not 0 <= task < len(plan):
        raise ValueError(f"--task {task}: the sweep has the tasks 0 to {len(plan) - 1}")
    from train.sweep.agreement import check_folder, ended_runs  # torch takes its time

    check_folder(plan, request.config)
    if ended_runs([plan[task]], request.config):
        print(f"{plan[task].folder} is {run_status(plan[task].folder)}")
        return 0
    sys.stdout.flush()
    command = fit_command(plan[task], request.config)
    os.execv(command[0], command)


def _run_all(request: SweepRequest, plan: list[PlannedRun], args: argparse.Namespace) -> int:
    from train.sweep.agreement import check_folder, ended_runs  # torch takes its time

    check_folder(plan, request.config)
    ended = ended_runs(plan, request.config)
    for folder in (planned.folder for planned in plan if planned.folder in ended):
        print(f"{folder} is {run_status(folder)}", flush=True)
    launcher = Launcher(request.config, args.jobs)
    failed: dict[Path, str] = {}
    for group in _stages(request, plan, args.target_se):
        failed |= launcher.run([p for p in group if p.folder not in ended])
        failed |= _mispaired(plan)
        if launcher.stopped:
            return 128 + launcher.stopped
    _evaluate_casts(plan, failed)
    for folder, reason in failed.items():
        print(f"lowbit: failed: {folder} ({reason})", file=sys.stderr)
    print(f"next: lowbit compare {request.out}")
    diverged = any(run_status(planned.folder) == "diverged" for planned in plan)
    return 1 if failed else 3 if diverged else 0


def _stages(
    request: SweepRequest, plan: list[PlannedRun], target: float | None
) -> Iterator[list[PlannedRun]]:
    """All runs at once; with a target, those of the first seeds and then as many as it takes."""
    if target is None:
        yield plan
        return
    check_target(target)
    seeds = list(dict.fromkeys(planned.seed for planned in plan))
    first = seeds[:FIRST_STAGE]
    write_stopping(request.out, Stopping(target, tuple(first)))
    yield [planned for planned in plan if planned.seed in first]
    gaps = {name: [values] for name, values in _gaps(plan, first).items()}
    more = seeds[len(first) : second_stage(gaps, target, len(seeds), "seeds")]
    yield [planned for planned in plan if planned.seed in more]


def _mispaired(plan: Sequence[PlannedRun]) -> dict[Path, str]:
    """Runs that did not start from the weights that the first run of their seed started from."""
    first: dict[int, tuple[Path, str]] = {}
    found = {}
    for planned in plan:
        if not has_record(planned.folder):
            continue
        info = read_record(planned.folder)
        if info.get("control"):
            continue  # its weights are perturbed by design
        folder, weights = first.setdefault(planned.seed, (planned.folder, info["initial_weights"]))
        if info["initial_weights"] != weights:
            found[planned.folder] = f"its initial weights are not those of {folder}"
    return found


def _gaps(plan: list[PlannedRun], seeds: Sequence[int]) -> dict[str, list[float]]:
    """Of every recipe to the first, by its label."""
    groups: dict[str, dict[int, Run]] = {}
    for planned in plan:
        if planned.seed in seeds and run_status(planned.folder) in ENDED:
            groups.setdefault(planned.variant.label, {})[planned.seed] = read_run(planned.folder)
    first = groups.pop(plan[0].variant.label, {})
    return {name: compare_pair(first, group).gaps or [] for name, group in groups.items() if first}


def _evaluate_casts(plan: list[PlannedRun], failed: dict[Path, str]) -> None:
    """Per seed and override, the weights of the first recipe's run under every run's recipe."""
    from train.sweep.casts import cast_gaps  # torch takes its time

    groups: dict[tuple[int, str], list[PlannedRun]] = {}
    for planned in plan:
        groups.setdefault((planned.seed, planned.variant.override), []).append(planned)
    for group in groups.values():
        baseline = group[0].folder
        done = [p for p in group if p.folder not in failed and run_status(p.folder) in ENDED]
        known = _fresh_casts(baseline, [p.folder for p in done])
        names = {
            record["recipe"] for p in done if not (record := read_record(p.folder)).get("control")
        }
        if group[0] in done and run_status(baseline) == "finished" and not {*known} >= names:
            print(f"{baseline}: evaluating its weights under every recipe", flush=True)
            if found := cast_gaps(baseline, [p.folder for p in done]):
                write_cast_gaps(baseline, known | found)


def _fresh_casts(baseline: Path, done: Sequence[Path]) -> dict[str, CastGap]:
    """Those of the weights and recipes that are there now; others are evaluated anew."""
    found = read_cast_gaps(baseline)
    if not found or baseline not in done:
        return {}
    base = run_identity(baseline, read_record(baseline))
    records = {folder: read_record(folder) for folder in done}
    arms = {r["recipe"]: run_identity(f, r) for f, r in records.items() if not r.get("control")}
    fresh = {}
    for name, gap in found.items():
        if name in arms and (why := gap.stale(base, arms[name])):
            print(f"{baseline}: the cast gap of {name} is {why}", flush=True)
        else:
            fresh[name] = gap
    return fresh
