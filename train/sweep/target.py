"""`--target-se`: Stein's two stages, a rule for stopping whose error is known.

The first units tell the spread, and the spread tells how many there will be; nothing is looked at
again. The interval keeps the first stage's spread and its degrees of freedom: with noise that
is normal its error is exactly the nominal one, however many units follow (Stein 1945).
"""

from collections.abc import Mapping

from train.stats.strata import Strata, estimate, units_needed

FIRST_STAGE = 4  # units of each stratum: of three, the quantile would be half as large again


def second_stage(gaps: Mapping[str, Strata], target: float, planned: int, what: str) -> int:
    """How many units of each stratum there shall be, at most `planned`; says so."""
    check_target(target)
    for label, strata in gaps.items():
        found = estimate(strata)
        if found.standard_error is None or found.mean is None:
            print(f"{label}: {found.units} {what}, too few for a standard error", flush=True)
            return planned
        needed = units_needed([strata], target)
        print(
            f"{label}: {found.mean:+.5f} ± {found.standard_error:.5f} from {found.units} {what};"
            f" {target:g} takes {needed}" + (" of each" if len(strata) > 1 else ""),
            flush=True,
        )
    wanted = units_needed([*gaps.values()], target)
    if wanted > planned:
        print(f"{target:g} is not reached: it takes {wanted}, planned are {planned}", flush=True)
    return min(max(FIRST_STAGE, wanted), planned)


def check_target(target: float | None) -> None:
    if target is not None and not target > 0:
        raise ValueError(f"--target-se {target}: expected a positive number")
