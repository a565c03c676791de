"""All rows of a comparison judged together: verdicts, what could have been seen, equivalence.

Two families of tests, each false in at most 5 %: rows against the baseline, full runs and branches
alike, by intervals that hold together; and all pairs, by Holm's p-values.
"""

from argparse import ArgumentTypeError
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

from train.stats.intervals import CONFIDENCE, Estimate, t_quantile, verdict_of
from train.stats.power import detectable, equivalence_power, equivalent
from train.stats.several import dunnett_quantile, holm, sidak_quantile

Row = dict[str, Any]


def planned_pair(text: str) -> tuple[str, str]:
    """`A:B` of the command line: A against B."""
    names = text.split(":")
    if len(names) != 2 or not all(names) or names[0] == names[1]:
        raise ArgumentTypeError(f"{text!r}, expected A:B, the labels of two recipes")
    return names[0], names[1]


def chosen_pairs(
    labels: Sequence[str], baseline: str, planned: Sequence[tuple[str, str]] | None
) -> list[tuple[str, str]]:
    """(a, b) for every row: b against a. All, or those with the baseline and the planned ones."""
    if planned is None:
        return list(combinations(labels, 2))
    own = [(a, b) for b, a in planned if a in labels and b in labels and a != baseline]
    return [*((baseline, label) for label in labels if label != baseline), *own]


def judge(result: dict[str, Any], margin: float | None = None) -> None:
    """Complete the rows of `result`: pairs of runs, and rows and pairs of branches."""
    full = [pair for pair in result["pairs"] if pair["a"] == result["baseline"]]
    branches = [row for found in result["branches"] for row in found["rows"]]
    against = [*_judged(full), *_judged(branches)]
    for row in against:
        _judge_together(row, len(against), len(_judged(full)) if row in full else 0)
    others = [pair for pair in result["pairs"] if pair["a"] != result["baseline"]]
    others += [pair for found in result["branches"] for pair in found["pairs"]]
    pairs = [*against, *_judged(others)]
    adjusted = holm([row["p"] for row in pairs])
    for row, p in list(zip(pairs, adjusted, strict=True))[len(against) :]:
        row["p_holm"] = p
        low_high = (row["low"], row["high"])
        row["verdict"] = verdict_of(*low_high) if p < 1 - CONFIDENCE else "not distinguishable"
        _add_detectable(row, t_quantile((1 + CONFIDENCE) / 2, row["freedom"]))
    if margin is not None:
        for row in (*full, *branches, *others):
            row["equivalence"] = _equivalence(row, margin)
    result["judged"] = {"against the baseline": len(against), "pairs": len(pairs)}


def _judged(rows: Iterable[Row]) -> list[Row]:
    """Those that a test can tell something of; they get its p-value."""
    found = [row for row in rows if row["freedom"] and "no verdict" not in row["verdict"]]
    for row in found:
        row["p"] = _estimate(row).p
    return found


def _estimate(row: Row) -> Estimate:
    keys = ("mean", "standard_error", "freedom", "low", "high")
    return Estimate(row.get("units", 0), *(row[key] for key in keys))


def _judge_together(row: Row, rows: int, of_runs: int) -> None:
    """`of_runs`: how many of the rows are full runs, which share their baseline; 0 for branches."""
    freedom = row["freedom"]
    if of_runs:
        share = CONFIDENCE ** (of_runs / rows)
        quantile = dunnett_quantile(of_runs, round(freedom) + 1, share)
    else:
        quantile = sidak_quantile(rows, freedom)
    reach = quantile * row["standard_error"]
    low, high = row["mean"] - reach, row["mean"] + reach
    row["verdict"] = verdict_of(low, high)
    if rows > 1:
        row["simultaneous"], row["rows"] = [low, high], rows
    _add_detectable(row, quantile)


def _add_detectable(row: Row, quantile: float) -> None:
    row["detectable"] = detectable(row["freedom"], quantile) * row["standard_error"]


def _equivalence(row: Row, margin: float) -> str | None:
    if row["standard_error"] is None or (row["freedom"] and "no verdict" in row["verdict"]):
        return None
    found = _estimate(row)
    if equivalent(found, margin):
        return f"equivalent within {margin:g}"
    power = equivalence_power(found, margin)
    chance = "" if power is None else f" (no gap would show it in {100 * power:.0f} % of cases)"
    return f"not shown to be equivalent within {margin:g}{chance}"
