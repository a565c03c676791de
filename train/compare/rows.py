"""The rows of a comparison: what is said of each run, and of each label's runs together."""

import json
from dataclasses import asdict
from typing import Any

import numpy as np

from train.compare.gaps import matched
from train.runs.casts import CastGap, read_cast_gaps
from train.runs.metrics import is_empty, perplexity
from train.runs.run import Run


def cast_gaps(base: Run, runs: list[Run], stale: list[str]) -> dict[str, CastGap]:
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


def run_row(one: Run, base: Run | None, casts: dict[str, CastGap]) -> dict[str, Any]:
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
        "nonfinite_steps": int((~is_empty(one.metrics["train/loss"])).sum()) - len(train),
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


def recipe_row(group: dict[int, Run]) -> dict[str, Any]:
    ended = [one for one in group.values() if one.status not in ("failed", "diverged")]
    last = max((one.tokens for one in ended), default=0)  # one that still runs is behind
    finals = [one.val_curve[1][-1] for one in ended if len(one.val_curve[1]) and one.tokens == last]
    return {
        "label": next(iter(group.values())).label,
        "seeds": list(group),
        "mean_val_loss": float(np.mean(finals)) if finals else None,
        "seed_spread": float(np.std(finals, ddof=1)) if len(finals) > 1 else None,
    }
