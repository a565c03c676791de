"""Branches: paired short continuations of checkpoints, in this process, over different batches.

From one checkpoint every arm (a recipe, perhaps under an override) takes the same H steps on the
same batches, with the checkpoint's optimizer state and the learning rate of the run's schedule; the
validation loss that follows is computed under the baseline's numerics. A branch is one such set of
continuations: its gaps are paired, and branches of other batches are independent of it. They
measure a drift, at these checkpoints and after so many steps, without the chaos of a whole run.
"""

import argparse
import shlex
from dataclasses import replace
from typing import Any

import torch

from lowbit import bf16
from train.compare.branch_casts import CastSet, read_casts
from train.compare.branch_shape import check_distinct
from train.compare.branches import FILE, BranchSet, read_branches, reread
from train.config.strict_yaml import read_yaml
from train.model.products import check_products
from train.runs.folders import check_branches_folder
from train.runs.lock import held
from train.runs.provenance import code_origin, command_line
from train.runs.record import has_record
from train.sweep.request import SweepRequest, Variant, read_request
from train.sweep.status import duration
from train.sweep.target import FIRST_STAGE, check_target, second_stage
from train.sweep.units import Arms, BranchPoint, CastUnit, Unit, Workers

LOCK = "lock"  # of a folder of branches, for the moments in which a file of it changes


def run_branches(args: argparse.Namespace) -> int:
    """The verb with --branch-from; a rerun keeps the branches that are done."""
    points, request = _read(args)
    variants = tuple(request.variants())
    for point in points:  # what is wrong with an arm is said before anything runs
        Arms.of(point, variants)
    out, labels = request.out, [variant.label for variant in variants]
    with held(out / LOCK):
        branches = _resume(request, _describe(points, request, args.horizon))
        branches.write(out)
    what = f"branches of {len(points)} checkpoints"
    check_target(args.target_se)
    first = args.branches if args.target_se is None else min(FIRST_STAGE, args.branches)

    def run_until(rounds: int) -> None:
        nonlocal branches
        wanted = [
            Unit(index, point, branch, variants, args.horizon, missing)
            for index, point in enumerate(points)
            for branch in range(rounds)
            if (missing := branches.missing(index, branch, labels))
        ]
        for done, unit in enumerate(workers.results(wanted), 1):
            with held(out / LOCK):  # another call may add other arms meanwhile
                branches = reread(out).with_unit(unit)
                branches.write(out)
            left = duration((len(wanted) - done) * unit["seconds"] / args.jobs)
            count = f"{done} of {len(wanted)} {what}, {len(unit['losses'])} arms each"
            print(f"{count}, {left} left" if done < len(wanted) else count, flush=True)

    with Workers(args.jobs) as workers:
        run_until(first)
        if args.target_se is not None:
            with held(out / LOCK):
                branches = reread(out)
                branches = replace(branches, first_stage=branches.first_stage or first)
                branches.write(out)
            gaps = branches.gaps(branches.first_stage)
            run_until(second_stage(gaps, args.target_se, args.branches, what))
        if args.casts:
            _cast(workers, points, request)
    print("\n".join(branches.lines()))
    print(f"`lowbit compare SWEEP {request.out}` shows them beside full runs")
    return 0


def _cast(workers: Workers, points: list[BranchPoint], request: SweepRequest) -> None:
    """The checkpoints' weights under every recipe that they lack; controls have none."""
    own = [v for v in request.variants() if not v.changes and not _control(v)]
    found = read_casts(request.out) or CastSet(own[0].recipe_name)
    wanted = []
    for index, point in enumerate(points):
        missing = found.missing(point.digest, [v.recipe_name for v in own])
        if chosen := tuple(v for v in own if v.recipe_name in missing):
            wanted.append(CastUnit(index, point, (own[0], *chosen)))
    for done, unit in enumerate(workers.results(wanted), 1):
        with held(request.out / LOCK):
            found = (read_casts(request.out) or found).with_unit(unit)
            found.write(request.out)
        print(f"casts of {done} of {len(wanted)} checkpoints", flush=True)


def _control(variant: Variant) -> str | None:
    found: str | None = read_yaml(variant.recipe)["model"].get("control")
    return found


def _read(args: argparse.Namespace) -> tuple[list[BranchPoint], SweepRequest]:
    if args.horizon is None or args.branches is None or min(args.horizon, args.branches) < 1:
        raise ValueError("--branch-from needs --horizon and --branches, each at least 1")
    if args.status or args.task is not None:
        raise ValueError("--status and --task are for runs, not for --branch-from")
    request = read_request(args)
    if request.config or request.arguments:
        raise ValueError("branches take their configuration from the checkpoints' runs: no -c")
    if has_record(request.out) or any(request.out.glob("*/run.json")):
        raise ValueError(f"--out {request.out} holds runs: choose another for branches")
    check_branches_folder(request.out)
    points = [BranchPoint.read(path) for path in args.branch_from]
    for point in points:
        if point.step + args.horizon > point.max_steps:
            raise ValueError(f"{point.path} + {args.horizon} steps is beyond the run's last step")
    return points, request


def _describe(points: list[BranchPoint], request: SweepRequest, horizon: int) -> BranchSet:
    variants = request.variants()
    arms: list[dict[str, Any]] = [
        {"label": v.label, "recipe": str(v.recipe), "changes": dict(v.changes)} for v in variants
    ]
    built = Arms.of(points[0], tuple(variants))
    for arm, variant in zip(arms, variants, strict=True):
        arm |= {"control": _control(variant)} | built.recipe(variant.label)
    checkpoints = [
        {"path": str(p.path), "step": p.step, "max_steps": p.max_steps, "digest": p.digest}
        | ({"identity": p.identity} if p.identity else {})
        for p in points
    ]
    check_distinct(checkpoints)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    origin = code_origin() | {"bf16_products": bf16.products(device.type)}
    command = shlex.join(command_line())
    return BranchSet(variants[0].label, horizon, arms, checkpoints, origin, [command])


def _resume(request: SweepRequest, fresh: BranchSet) -> BranchSet:
    """What is there already, if it is of the same kind, and arms and checkpoints that are new."""
    done = read_branches(request.out)
    if done is None:
        return fresh
    known = {arm["label"]: arm for arm in done.arms}
    more = fresh.checkpoints[len(done.checkpoints) :]
    before = replace(done, checkpoints=[*done.checkpoints, *more])
    changes = [
        (name, getattr(before, name), getattr(fresh, name))
        for name in ("baseline", "horizon", "checkpoints")
    ]
    changes += [c for arm in fresh.arms for c in _of_arm(known.get(arm["label"], arm), arm)]
    for name, was, now in changes:
        if was != now:
            raise ValueError(
                f"{request.out} holds other branches: {name} was {was}, now it is {now}; choose"
                " another --out"
            )
    check_products(request.out / FILE, done.origin, fresh.origin["bf16_products"])
    new = [arm for arm in fresh.arms if arm["label"] not in known]
    commands = [*dict.fromkeys([*done.commands, *fresh.commands])]
    return replace(before, arms=[*done.arms, *new], commands=commands)


def _of_arm(was: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What an arm computes with, before and now; of an older lowbit, where its file was."""
    keys = ["changes", "recipe_hash"]
    if "recipe_hash" not in was:
        keys = ["changes", "control", "recipe"]
    return [(f"{key} of {now['label']}", was[key], now[key]) for key in keys]
