"""`lowbit compare`: run folders in; a table, pictures and a report out; exit 1 over a bound."""

import argparse
import json
import math
import shlex
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from train.compare.branch_shape import check_arms
from train.compare.branches import BranchSet, find_branches, read_branches
from train.compare.dynamics import behaviour, common_target
from train.compare.gaps import RULE, compare_pair
from train.compare.gates import TIMES, over_bound, unequal
from train.compare.golden import check_golden_file, export_curves, import_curves
from train.compare.notes import notes
from train.compare.pairing import (
    FIELDS,
    allowed_field,
    check_copies,
    check_pairing,
    circumstances,
    contrast,
    recipe_lines,
)
from train.compare.resolved import cast_orders
from train.compare.rows import cast_gaps, recipe_row, run_row
from train.compare.stopping import read_stopping
from train.compare.table import terminal
from train.compare.verdicts import chosen_pairs, judge, planned_pair
from train.curves.curve import KEYS, CurveRequest, curve_notes, curve_runs
from train.output.tables import printable
from train.runs.declaration import any_covers
from train.runs.folders import check_results_folder
from train.runs.record import has_record
from train.runs.run import SMOOTHING, Run, read_runs
from train.stats.intervals import MIN_UNITS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.description = (
        "Compare runs with the first. Exit codes: 0 done, 1 over --max-gap or not equal (all is"
        " written all the same), 2 refused: not a pair, not readable, nothing written."
    )
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="run folder, or a sweep (bf16 first)"
    )
    parser.add_argument(
        "--curve", action="append", nargs="+", default=[], metavar="WORD",
        help="NAME PATH [key=value ...]: a run of another trainer, from its CSV, JSON lines,"
        f" torchtitan log or TensorBoard folder; keys say what a column is: {', '.join(KEYS)}",
    )  # fmt: skip
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
        "--pairs", action="extend", nargs="+", type=planned_pair, metavar="A:B",
        help="judge A against B, labels of recipes, and no other pair but those with the baseline:"
        " the questions asked in advance (default: all pairs)",
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
    requests = [CurveRequest.of(words) for words in args.curve]
    if not folders and not requests:
        raise ValueError("no runs: give run folders, a sweep (with branches, theirs), or --curve")
    golden = import_curves(args.import_) if args.import_ else []
    runs = read_runs(folders, golden) if folders or golden else []
    runs += curve_runs(requests, runs)
    margin = args.equivalent_within
    if margin is not None and not 0 < margin < math.inf:
        raise ValueError(f"--equivalent-within {margin}: expected a positive number")
    allowed = check_pairing(runs, args.allow)
    check_copies(runs)
    for path, found in branches:
        found.check_belongs(path, [one.identity for one in runs])
        if not any_covers(args.allow, "recipe_table"):
            check_arms(found, path, [(one.label, one.identity) for one in runs])
    check_planned(args.pairs, runs, [found for _, found in branches])
    documents = [found.document(path, args.pairs) for path, found in branches]
    if args.export:
        check_golden_file(args.export)
    result = compare(runs, allowed, documents, margin, args.pairs)
    if (args.assert_equal or args.max_gap is not None) and not result["pairs"]:
        raise ValueError(f"a bound needs a recipe beside the baseline {result['baseline']}")
    result["command"] = _command(args)
    failures = [*over_bound(result, args.max_gap)] if args.max_gap is not None else []
    failures += [*unequal(runs, golden)] if args.assert_equal else []
    from train.compare.report import write_report  # matplotlib takes its time

    first = [*folders, *(request.path.parent for request in requests)][0]
    is_run = has_record(first)
    folder = args.out or (first.resolve().parent if is_run else first) / "compare"
    check_results_folder(folder)
    if args.tensorboard:
        from train.compare.overlay import check_overlay, write_overlay  # so does TensorBoard

        check_overlay(folder)
    write_report(result, runs, folder)
    if args.tensorboard:
        write_overlay(json.loads((folder / "compare.json").read_text()), folder)
    if args.export:
        export_curves(
            [one for one in runs if one.path not in [g.path for g in golden]], args.export
        )
    print(printable(f"{terminal(result)}\n\nreport: {folder / 'report.html'}"))
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


def _command(args: argparse.Namespace) -> str:
    """What made this report."""
    parts = [*args.runs]
    for words in args.curve:
        parts += ["--curve", *words]
    flags = {"--import": args.import_, "--allow": args.allow, "--out": args.out}
    flags |= {"--pairs": args.pairs and [":".join(pair) for pair in args.pairs]}
    flags |= {"--equivalent-within": args.equivalent_within}
    for flag, value in flags.items():
        parts += [flag, *(value if isinstance(value, list) else [value])] if value else []
    return shlex.join(["lowbit", "compare", *map(str, parts)])


def compare(
    runs: list[Run],
    allowed: Collection[str] = (),
    branches: Sequence[dict[str, Any]] = (),
    margin: float | None = None,
    planned: Sequence[tuple[str, str]] | None = None,
) -> dict[str, Any]:
    """All numbers of the comparison as plain data; the baseline is the first run's label.

    `branches`: documents of theirs; `margin`: within which gaps are called equivalent; `planned`:
    the pairs to be judged beside those with the baseline, each (b, a); None: all.
    """
    groups: dict[str, dict[int, Run]] = {}
    for one in runs:
        groups.setdefault(one.label, {})[one.seed] = one
    baseline = groups[runs[0].label]
    stale: list[str] = []
    casts = {seed: cast_gaps(one, runs, stale) for seed, one in baseline.items()}
    target = common_target(runs)
    rows = [
        run_row(one, baseline.get(one.seed), casts.get(one.seed, {})) | behaviour(one, target)
        for one in runs
    ]
    first = _first_stage(runs)
    labels = chosen_pairs([*groups], runs[0].label, planned)
    both = [(groups[a], groups[b]) for a, b in labels]
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
        "recipes": [recipe_row(group) for group in groups.values()],
        "pairs": [asdict(p) | c for p, c in zip(pairs, contrasts, strict=True)],
        "branches": [*branches],
        "planned": planned,
    }
    judge(result, margin)
    own = [
        *curve_notes(runs),
        *cast_orders(rows),
        *recipe_lines(result),
        *circumstances(runs),
        *stale,
    ]
    return result | {"notes": [*own, *notes(result, runs, baseline, pairs, casts)]}


def check_planned(
    planned: Sequence[tuple[str, str]] | None, runs: list[Run], branches: Sequence[BranchSet]
) -> None:
    """ValueError for a pair of which there are neither runs nor branches."""
    places = [{one.label for one in runs}, *({a["label"] for a in b.arms} for b in branches)]
    for pair in planned or ():
        if not any({*pair} <= labels for labels in places):
            known = sorted(set().union(*places))
            raise ValueError(f"--pairs {':'.join(pair)}: expected two of {', '.join(known)}")


def _first_stage(runs: list[Run]) -> tuple[int, ...]:
    """Of the sweep that all these runs are of, if their number was chosen by their spread."""
    found = {read_stopping(folder) for folder in {run.path.parent for run in runs}} - {None}
    return max((one.first for one in found if one), key=len, default=())
