"""What a comparison has resolved, in sentences: the order of the casts' divergences."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any


def cast_orders(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence a seed: KL(baseline || cast) of the formats, in ascending order.

    Two are told apart where they differ by more than two standard errors of independent samples;
    they are of the same windows, which makes the test a careful one.
    """
    found = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        casts = {
            row["label"]: row["cast_gap"]
            for row in rows
            if row["seed"] == seed and _has_error(row["cast_gap"])
        }
        order = sorted(casts, key=lambda label: casts[label]["kl"])
        if len(order) > 1:
            found.append(_sentence(seed, [(label, casts[label]) for label in order]))
    return found


def _has_error(cast: dict[str, Any] | None) -> bool:
    """Not the baseline under itself, whose divergence is 0 without one."""
    return bool(cast and cast.get("kl") and cast.get("kl_standard_error"))


def _sentence(seed: int, casts: list[tuple[str, dict[str, Any]]]) -> str:
    text = [f"{label} {cast['kl']:.1e} ± {cast['kl_standard_error']:.0e}" for label, cast in casts]
    steps = []
    for (low, a), (high, b) in pairwise(casts):
        error = (a["kl_standard_error"] ** 2 + b["kl_standard_error"] ** 2) ** 0.5
        if b["kl"] - a["kl"] > 2 * error:
            steps.append(f"{high} is {b['kl'] / a['kl']:.1f} times {low}: resolved")
        else:
            steps.append(f"{high} and {low} are not told apart")
    floor = casts[0][1].get("kl_floor")
    beside = "" if floor is None else f"; floor (weights moved by 1e-6) {floor:.0e}"
    return (
        f"Seed {seed}, what a cast does to the predictions (KL to the baseline, nats per token):"
        f" {', '.join(text)}{beside}. {'; '.join(steps)}."
    )
