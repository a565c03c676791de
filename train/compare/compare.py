"""`lowbit compare`: run folders in; a table, pictures and a report out; exit 1 over a bound."""

import argparse
import json
import math
import shlex
from collections.abc import Collection, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from train.compare.branches import find_branches, read_branches
from train.compare.copies import check_copies
from train.compare.dynamics import behaviour, common_target
from train.compare.gaps import RULE, Pair, compare_pair, matched
from train.compare.gates import TIMES, over_bound, unequal
from train.compare.golden import export_curves, import_curves
from train.compare.pairing import (
    FIELDS,
    allowed_field,
    check_pairing,
    circumstances,
    contrast,
    recipe_lines,
)
from train.compare.resolved import cast_orders
from train.compare.stopping import read_stopping
from train.compare.table import terminal
from train.compare.verdicts import judge
from train.runs.casts import CastGap, read_cast_gaps
from train.runs.folders import check_results_folder
from train.runs.metrics import perplexity
from train.runs.record import has_record
from train.runs.run import SMOOTHING, Run, read_runs
from train.stats.intervals import MIN_UNITS

CHAOS = (
    "Two BF16 runs whose initial weights differ by 1e-6 drift apart by many times the effect of the"
    " formats: by 0.03 in final loss a seed on the quickstart's model, against 0.001 published for"
    " a format. No ordering follows from single runs."
)
CAST = (
    "cast gap: val loss of the baseline's final weights evaluated under the recipe, minus that"
    " without it; no training noise, and no effect of training either; s.e. over"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.description = (
        "Compare runs with the first. Exit codes: 0 done, 1 over --max-gap or not equal (all is"
        " written all the same), 2 refused: not a pair, not readable, nothing written."
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folder, or a sweep (bf16 first)"
    )
    parser.add_argument("--out", type=Path, help="folder to write (default: compare/ by the runs)")
    parser.add_argument(
        "--allow", action="extend", nargs="+", default=[], type=allowed_field, metavar="FIELD",
        help=f"compare although this differs, and say so: {', '.join(FIELDS)}, or a config key",
    )  # fmt: skip
    parser.add_argument(
        "--max-gap", type=float, metavar="X",
        help="exit 1 unless every recipe's gap, of runs and of branches, is below X with its whole"
        f" 95 %% interval; at least {MIN_UNITS} units, none diverged or failed",
    )  # fmt: skip
    parser.add_argument(
        "--equivalent-within", type=float, metavar="X",
        help="say which gaps lie within X either way, by two one-sided 5 %% tests",
    )  # fmt: skip
    parser.add_argument(
        "--assert-equal", action="store_true",
        help="exit 1 unless bitwise equal, to the baseline or to --import's runs of the same name,"
        f" in every column but {', '.join(TIMES)}",
    )  # fmt: skip
    parser.add_argument(
        "--tensorboard", action="store_true",
        help="write a TensorBoard folder too: overlaid curves, mean gaps, HParams",
    )  # fmt: skip
    parser.add_argument(
        "--export", type=Path, metavar="FILE", help="write the runs' curves: golden ones for CI"
    )
    parser.add_argument(
        "--import", type=Path, dest="import_", metavar="FILE",
        help="exported curves to compare with; the first of them is the baseline",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Compare the runs; 1 where a bound is exceeded."""
    branches = [found for path in args.runs for found in find_branches(path)]
    folders = [path for path in args.runs if read_branches(path) is None]
    if not folders:
        raise ValueError("branches alone: give the runs, or the sweep, that they belong to as well")
    golden = import_curves(args.import_) if args.import_ else []
    runs = read_runs(folders, golden)
    margin = args.equivalent_within
    if margin is not None and not 0 < margin < math.inf:
        raise ValueError(f"--equivalent-within {margin}: expected a positive number")
    allowed = check_pairing(runs, args.allow)
    check_copies(runs)
    for path, found in branches:
        found.check_belongs(path, [one.identity for one in runs])
    result = compare(runs, allowed, [found.document(path) for path, found in branches], margin)
    if (args.assert_equal or args.max_gap is not None) and not result["pairs"]:
        raise ValueError(f"a bound needs a recipe beside the baseline {result['baseline']}")
    result["command"] = _command(args)
    failures = [*over_bound(result, args.max_gap)] if args.max_gap is not None else []
    failures += [*unequal(runs, golden)] if args.assert_equal else []
    from train.compare.report import write_report  # matplotlib takes its time

    first = folders[0]
    is_run = has_record(first)
    folder = args.out or (first.resolve().parent if is_run else first) / "compare"
    check_results_folder(folder)
    write_report(result, runs, folder)
    if args.tensorboard:
        from train.compare.overlay import write_overlay  # so does TensorBoard

        write_overlay(json.loads((folder / "compare.json").read_text()), folder)
    if args.export:
        export_curves(
            [one for one in runs if one.path not in [g.path for g in golden]], args.export
        )
    print(f"{terminal(result)}\n\nreport: {folder / 'report.html'}")
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


def _command(args: argparse.Namespace) -> str:
    """What made this report."""
    parts = [*args.runs]
    for flag, value in (("--import", args.import_), ("--allow", args.allow), ("--out", args.out)):
        parts += [flag, *(value if isinstance(value, list) else [value])] if value else []
    return shlex.join(["lowbit", "compare", *map(str, parts)])


def compare(
    runs: list[Run],
    allowed: Collection[str] = (),
    branches: Sequence[dict[str, Any]] = (),
    margin: float | None = None,
) -> dict[str, Any]:
    """All numbers of the comparison as plain data; the baseline is the first run's label.

    `branches`: documents of theirs; `margin`: within which gaps are called equivalent.
    """
    groups: dict[str, dict[int, Run]] = {}
    for one in runs:
        groups.setdefault(one.label, {})[one.seed] = one
    baseline = groups[runs[0].label]
    stale: list[str] = []
    casts = {seed: _cast_gaps(one, runs, stale) for seed, one in baseline.items()}
    target = common_target(runs)
    rows = [
        _row(one, baseline.get(one.seed), casts.get(one.seed, {})) | behaviour(one, target)
        for one in runs
    ]
    first = _first_stage(runs)
    both = list(combinations(groups.values(), 2))
    pairs = [compare_pair(a, b, first) for a, b in both]
    contrasts = [contrast(a, b).plain() for a, b in both]
    result = {
        "format_version": 1,
        "baseline": runs[0].label,
        "smoothing": SMOOTHING,
        "target": target,
        "rule": RULE,
        "allowed": list(allowed),
        "runs": rows,
        "recipes": [_recipe(group) for group in groups.values()],
        "pairs": [asdict(p) | c for p, c in zip(pairs, contrasts, strict=True)],
        "branches": [*branches],
    }
    judge(result, margin)
    own = [*cast_orders(rows), *recipe_lines(result), *circumstances(runs), *stale]
    return result | {"notes": [*own, *_notes(result, runs, baseline, pairs, casts)]}


def _first_stage(runs: list[Run]) -> tuple[int, ...]:
    """Of the sweep that all these runs are of, if their number was chosen by their spread."""
    found = {read_stopping(folder) for folder in {run.path.parent for run in runs}} - {None}
    return max((one.first for one in found if one), key=len, default=())


def _cast_gaps(base: Run, runs: list[Run], stale: list[str]) -> dict[str, CastGap]:
    """By recipe name, without the names that stand for several tables here (overridden recipes).

    One that is of other weights or of another recipe is left out, and `stale` says so.
    """
    arms = {one.recipe: one for one in runs if one.seed == base.seed and not one.control}
    tables = {(run.recipe, json.dumps(run.info.get("recipe_table"))) for run in runs}
    names = [name for name, _ in tables]
    found = {}
    for name, gap in read_cast_gaps(base.path).items():
        if names.count(name) > 1:
            continue
        if name in arms and (why := gap.stale(base.identity, arms[name].identity)):
            stale.append(f"{base.path}/cast_gap.json: {name}'s is {why}; the sweep makes it anew.")
        else:
            found[name] = gap
    return found


def _row(one: Run, base: Run | None, casts: dict[str, CastGap]) -> dict[str, Any]:
    _, train = one.train_curve
    row: dict[str, Any] = {
        "label": one.label, "seed": one.seed, "recipe": one.recipe, "status": one.status,
        "identity": one.identity.hash, "control": one.control, "path": str(one.path),
        "steps": len(one.metrics["step"]),
        "tokens": one.tokens, "val_loss": (val := one.last_validation),
        "perplexity": None if val is None else perplexity(val),
        "train_loss": float(train[-1]) if len(train) else None,
    }  # fmt: skip
    cast = casts.get(one.recipe)
    return row | _gaps_of(one, base) | {
        "cast_gap": asdict(cast) if cast else None,
        "tokens_per_second": one.tokens_per_second,
        "nonfinite_steps": len(one.metrics["step"]) - len(train),
    }  # fmt: skip


def _gaps_of(one: Run, base: Run | None) -> dict[str, Any]:
    """The last gap to the baseline run, unless one of the two stopped early, and the largest."""
    names = ("gap", "gap_relative", "gap_tokens", "max_gap", "max_gap_tokens")
    if base is None or base is one or not len((curve := matched(base.val_curve, one.val_curve))[0]):
        return dict.fromkeys(names)
    tokens, gap = curve
    largest = int(np.argmax(np.abs(gap)))
    last: tuple[Any, ...] = (None, None, None)
    if not {base.status, one.status} & {"diverged", "failed"}:
        loss = base.val_curve[1][base.val_curve[0] == tokens[-1]][0]
        last = float(gap[-1]), float(gap[-1] / loss), int(tokens[-1])
    return dict(zip(names, (*last, float(gap[largest]), int(tokens[largest])), strict=True))


def _recipe(group: dict[int, Run]) -> dict[str, Any]:
    ended = [one for one in group.values() if one.status not in ("failed", "diverged")]
    finals = [one.val_curve[1][-1] for one in ended if len(one.val_curve[1])]
    return {
        "label": next(iter(group.values())).label,
        "seeds": list(group),
        "mean_val_loss": float(np.mean(finals)) if finals else None,
        "seed_spread": float(np.std(finals, ddof=1)) if len(finals) > 1 else None,
    }


def _notes(
    result: dict[str, Any],
    runs: list[Run],
    baseline: dict[int, Run],
    pairs: list[Pair],
    casts: dict[int, dict[str, CastGap]],
) -> list[str]:
    judged = result["judged"]
    few = any(len(pair.seeds) < MIN_UNITS and "diverged" not in pair.verdict for pair in pairs)
    notes = [CHAOS] if few else []
    if judged["pairs"] > 1:
        notes.append(
            f"Verdicts hold together: {judged['against the baseline']} rows against the baseline"
            f" (runs and branches), in 5 % of cases one false; all {judged['pairs']} pairs by Holm,"
            " likewise. Each 95 % interval is one on its own."
        )
    stages = [pair.first_stage for pair in pairs if pair.first_stage]
    if stages:
        notes.append(
            f"The number of seeds was chosen by the spread of the first {len(stages[0])} (Stein):"
            " intervals keep that spread and its degrees of freedom."
        )
    if not any(one.control for one in runs) and pairs:
        notes.append(
            "No control among these runs: BF16 with its initial weights perturbed by 1e-6 would"
            " show what the same rule makes of chaos alone."
        )
    lone = [f"{one.label} seed {one.seed}" for one in runs if one.seed not in baseline]
    if lone:
        notes.append(f"Without a baseline run of their seed, hence in no gap: {', '.join(lone)}.")
    bad = [f"{one.label} seed {one.seed}" for one in runs if one.status == "failed"]
    if bad:
        notes.append(f"Failed, shown but in no mean: {', '.join(bad)}.")
    if pairs and any(casts.values()):
        units = dict.fromkeys(gap.units for found in casts.values() for gap in found.values())
        notes.append(f"{CAST[0].upper()}{CAST[1:]} {', '.join(units)}.")
    elif pairs:
        notes.append(
            "No cast gap: `lowbit sweep` leaves it as cast_gap.json in the baseline's run folder."
        )
    return notes
