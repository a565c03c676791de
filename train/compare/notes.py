"""What is said beside the rows of a comparison: how they are to be read, and what they lack."""

from typing import Any

from train.compare.gaps import Pair
from train.runs.casts import CastGap
from train.runs.run import Run
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


def notes(
    result: dict[str, Any],
    runs: list[Run],
    baseline: dict[int, Run],
    pairs: list[Pair],
    casts: dict[int, dict[str, CastGap]],
) -> list[str]:
    """What to know about the verdicts, and what is missing."""
    judged = result["judged"]
    few = any(len(pair.seeds) < MIN_UNITS and "diverged" not in pair.verdict for pair in pairs)
    found = [CHAOS] if few else []
    if judged["pairs"] > 1:
        which = "all" if result["planned"] is None else "with those of --pairs alone, the"
        found.append(
            f"Verdicts hold together: {judged['against the baseline']} rows against the baseline"
            f" (runs and branches), in 5 % of cases one false; {which} {judged['pairs']} pairs by"
            " Holm, likewise. Each 95 % interval is one on its own."
        )
    stages = [pair.first_stage for pair in pairs if pair.first_stage]
    if stages:
        found.append(
            f"The number of seeds was chosen by the spread of the first {len(stages[0])} (Stein):"
            " intervals keep that spread and its degrees of freedom."
        )
    if not any(one.control for one in runs) and pairs:
        found.append(
            "No control among these runs: BF16 with its initial weights perturbed by 1e-6 would"
            " show what the same rule makes of chaos alone."
        )
    lone = [f"{one.label} seed {one.seed}" for one in runs if one.seed not in baseline]
    if lone:
        found.append(f"Without a baseline run of their seed, hence in no gap: {', '.join(lone)}.")
    bad = [f"{one.label} seed {one.seed}" for one in runs if one.status == "failed"]
    if bad:
        found.append(f"Failed, shown but in no mean: {', '.join(bad)}.")
    if pairs and any(casts.values()):
        units = dict.fromkeys(gap.units for own in casts.values() for gap in own.values())
        found.append(f"{CAST[0].upper()}{CAST[1:]} {', '.join(units)}.")
    elif pairs:
        found.append(
            "No cast gap: `lowbit sweep` leaves it as cast_gap.json in the baseline's run folder."
        )
    return found
