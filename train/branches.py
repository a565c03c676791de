"""Branches: paired short continuations of checkpoints, in this process, over different batches.

From one checkpoint every arm (a recipe, perhaps under an override) takes the same H steps on the
same batches, with the checkpoint's optimizer state and the learning rate of the run's schedule; the
validation loss that follows is computed under the baseline's numerics. A branch is one such set of
continuations: its gaps are paired, and branches of other batches are independent of it. They
measure a drift, at these checkpoints and after so many steps, without the chaos of a whole run.
"""

import argparse
import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from train.branch_run import Continuation, build_module
from train.branch_set import BranchSet, read_branches
from train.checkpoint import step_of, verify_checkpoint
from train.estimate import report_target
from train.module import PretrainModule
from train.plan import SweepRequest, Variant, read_request
from train.record import code_origin, command_line
from train.yaml_safe import load_yaml

MIN_ROUNDS = 3  # before a target may end the branches: a spread of fewer is hardly known


@dataclass(frozen=True)
class BranchPoint:
    """A checkpoint, and the configuration of the run it is of."""

    path: Path
    step: int
    digest: str
    config: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "BranchPoint":
        if not path.is_dir():
            raise FileNotFoundError(f"--branch-from {path}: there is no such checkpoint folder")
        manifest = verify_checkpoint(path)
        config = path.parent.parent / "config.yaml"
        if not config.exists():
            raise FileNotFoundError(f"{path} lies in no run folder: {config} is missing")
        digest = _digest(json.dumps(manifest["files"], sort_keys=True))
        return cls(path, step_of(path), digest.hex(), load_yaml(config.read_text()))

    @property
    def max_steps(self) -> int:
        return int(self.config["trainer"]["max_steps"])

    def seed(self, branch: int) -> int:
        """Of the batches, dropout and stochastic rounding of a branch."""
        return int.from_bytes(_digest(f"{self.digest}:{branch}")[:4]) >> 1


def _digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=8).digest()


class Arms:
    """The modules of the variants; the judge computes under the baseline's numerics."""

    def __init__(self, config: dict[str, Any], variants: Sequence[Variant]) -> None:
        self._arms = {variant.label: build_module(config, variant) for variant in variants}
        self._judge = build_module(config, variants[0])

    def losses(self, continuation: Continuation) -> dict[str, float | None]:
        """By label; None where it diverged."""
        pairs: list[tuple[str, PretrainModule]] = [*self._arms.items()]
        return {label: continuation.run(module, self._judge) for label, module in pairs}


def run_branches(args: argparse.Namespace) -> int:
    """The verb with --branch-from; a rerun keeps the branches that are done."""
    if args.horizon is None or args.branches is None or min(args.horizon, args.branches) < 1:
        raise ValueError("--branch-from needs --horizon and --branches, each at least 1")
    request = read_request(args)
    if request.config or request.arguments:
        raise ValueError("branches take their configuration from the checkpoints' runs: no -c")
    points = [BranchPoint.read(path) for path in args.branch_from]
    for point in points:
        if point.step + args.horizon > point.max_steps:
            raise ValueError(f"{point.path} + {args.horizon} steps is beyond the run's last step")
    # every folder's arms are built here: what is wrong with them is said before anything runs
    folders = {point.path.parent: point.config for point in points}
    arms = {folder: Arms(config, request.variants()) for folder, config in folders.items()}
    branches = _resume(request, _describe(points, request, args.horizon))
    for branch in range(args.branches):
        for index, point in enumerate(points):
            if not branches.has(index, branch):
                unit = _unit(arms[point.path.parent], point, branch, args.horizon)
                branches = branches.with_unit({"checkpoint": index, "branch": branch} | unit)
                branches.write(request.out)
        print(f"branch {branch + 1} of {args.branches} from each checkpoint", flush=True)
        what = f"branches of {len(points)} checkpoints"
        if args.target_se is not None and branch + 1 >= min(MIN_ROUNDS, args.branches):
            if report_target(branches.gaps(), args.target_se, what):
                break
    print("\n".join(branches.lines()))
    print(f"`lowbit compare SWEEP {request.out}` shows them beside full runs")
    return 0


def _describe(points: Sequence[BranchPoint], request: SweepRequest, horizon: int) -> BranchSet:
    variants = request.variants()
    arms = [
        {"label": v.label, "recipe": str(v.recipe), "changes": dict(v.changes)} for v in variants
    ]
    for arm, variant in zip(arms, variants, strict=True):
        arm["control"] = load_yaml(variant.recipe.read_text())["model"].get("control")
    checkpoints = [
        {"path": str(p.path), "step": p.step, "max_steps": p.max_steps, "digest": p.digest}
        for p in points
    ]
    command = shlex.join(command_line())
    return BranchSet(variants[0].label, horizon, arms, checkpoints, code_origin(), [command])


def _resume(request: SweepRequest, fresh: BranchSet) -> BranchSet:
    """What is there already, if it is of the same kind."""
    done = read_branches(request.out)
    if done is None:
        return fresh
    for name in ("baseline", "horizon", "arms", "checkpoints"):
        if (before := getattr(done, name)) != (now := getattr(fresh, name)):
            raise ValueError(
                f"{request.out} holds other branches: {name} was {before}, now it is {now}; choose"
                " another --out"
            )
    return replace(done, commands=[*dict.fromkeys([*done.commands, *fresh.commands])])


def _unit(arms: Arms, point: BranchPoint, branch: int, horizon: int) -> dict[str, Any]:
    began = time.perf_counter()
    continuation = Continuation(point.path, point.config, point.seed(branch), horizon)
    return {
        "seed": point.seed(branch),
        "validation_windows": continuation.validation_windows,
        "losses": arms.losses(continuation),
        "seconds": time.perf_counter() - began,
    }
