"""`lowbit sweep`: the same run under several recipes and seeds, one after another."""

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from train.names import checked_name
from train.yaml_safe import load_yaml


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep: a recipe, a seed, and the folder it lives in."""

    recipe: Path
    seed: int
    folder: Path

    def command(self, configs: list[Path], overrides: list[str]) -> list[str]:
        """`lowbit fit` for it."""
        layers = [part for path in (*configs, self.recipe) for part in ("-c", str(path))]
        own = ["--run_dir", str(self.folder), "--seed_everything", str(self.seed)]
        return ["fit", *layers, *own, *overrides]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--out", type=Path, required=True, help="folder of the run folders")
    parser.add_argument(
        *("-c", "--config"), type=Path, action="append", required=True, help="model, trainer YAML"
    )
    parser.add_argument(
        "--recipes",
        type=Path,
        nargs="+",
        required=True,
        help="recipe YAMLs; the first is the baseline",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument("overrides", nargs="*", help="after --: further arguments of `lowbit fit`")


def run(args: argparse.Namespace) -> int:
    """Run what is not finished, then evaluate the cast gap; 1 if a run failed."""
    missing = [str(path) for path in (*args.config, *args.recipes) if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"no such file: {', '.join(missing)}")
    plan = plan_runs(args.out, args.recipes, args.seeds)
    failed = [p.folder for p in plan if not _finish(p, args.config, args.overrides)]
    for seed in args.seeds:
        _evaluate_casts([p.folder for p in plan if p.seed == seed and p.folder not in failed])
    if failed:
        print(f"lowbit: failed: {', '.join(map(str, failed))}", file=sys.stderr)
    print(f"next: lowbit compare {args.out}")
    return 1 if failed else 0


def plan_runs(out: Path, recipes: list[Path], seeds: list[int]) -> list[PlannedRun]:
    """Every recipe for every seed, the baseline first; refuses two recipes of one name."""
    names = [checked_name(_policy_name(path)) for path in recipes]
    if len(set(names)) < len(names):
        raise ValueError(f"recipes must have different names, found {names}")
    return [
        PlannedRun(recipe, seed, out / f"{name}-s{seed}")
        for seed in seeds
        for name, recipe in zip(names, recipes, strict=True)
    ]


def _policy_name(recipe: Path) -> str:
    return str(load_yaml(recipe.read_text())["model"]["policy"]["name"])


def _finish(planned: PlannedRun, configs: list[Path], overrides: list[str]) -> bool:
    """Start or resume the run in a process of its own, unless it is finished."""
    from train.record import run_status

    if run_status(planned.folder) == "finished":
        print(f"{planned.folder} is finished", flush=True)
        return True
    # -P: the current folder's own `data` or `train` must not stand in for ours
    command = [sys.executable, "-P", "-m", "train.cli", *planned.command(configs, overrides)]
    return subprocess.run(command).returncode == 0


def _evaluate_casts(folders: list[Path]) -> None:
    """The first run's final weights under every run's recipe, kept in its folder."""
    from train.cast import cast_gaps
    from train.runs import read_cast_gaps, write_cast_gaps

    if not folders:
        return
    baseline = folders[0]
    if not set(read_cast_gaps(baseline)) >= {folder.name.rpartition("-s")[0] for folder in folders}:
        print(f"{baseline}: evaluating its final weights under every recipe", flush=True)
        write_cast_gaps(baseline, cast_gaps(baseline, folders))
