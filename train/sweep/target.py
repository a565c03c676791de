"""The standard error that a sweep was asked for, and what it takes."""

from collections.abc import Mapping

from train.stats.strata import Strata, estimate, units_needed


def report_target(gaps: Mapping[str, Strata], target: float, what: str) -> bool:
    """Print where each recipe's mean stands; whether all have reached the target."""
    if not target > 0:
        raise ValueError(f"--target-se {target}: expected a positive number")
    reached = True
    for label, strata in gaps.items():
        found = estimate(strata)
        needed = units_needed(found, target)
        if found.standard_error is None or needed is None:
            print(f"{label}: {found.units} {what}, too few for a standard error", flush=True)
            reached = False
            continue
        reached = reached and found.standard_error <= target
        print(
            f"{label}: {found.mean:+.5f} ± {found.standard_error:.5f} from {found.units} {what};"
            f" {target:g} takes about {needed}",
            flush=True,
        )
    return reached
