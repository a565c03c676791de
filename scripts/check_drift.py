"""Whether few branches recover a planted drift: their estimate against that of all the others.

usage: python scripts/check_drift.py FOLDER     of branches; the first 3 rounds are the few
"""

import math
import sys
from dataclasses import replace
from pathlib import Path

from train.compare.branches import read_branches
from train.stats.strata import estimate

ROUNDS = 3


def main() -> int:
    found = read_branches(Path(sys.argv[1]))
    if found is None:
        raise SystemExit(f"no branches in {sys.argv[1]}")
    few = replace(found, units=[u for u in found.units if u["branch"] < ROUNDS])
    many = replace(found, units=[u for u in found.units if u["branch"] >= ROUNDS])
    outside = 0
    for label, strata in few.gaps().items():
        own, reference = estimate(strata), estimate(many.gaps()[label])
        if own.standard_error is None or reference.standard_error is None:
            raise SystemExit(f"{label}: {own.units} and {reference.units} branches are too few")
        assert own.mean is not None and reference.mean is not None
        error = math.hypot(own.standard_error, reference.standard_error)
        distance = abs(own.mean - reference.mean) / error
        outside += distance > 2
        shown = (f"{x.mean:+.5f} ± {x.standard_error:.5f} ({x.units})" for x in (own, reference))
        print(f"{label}: {' and '.join(shown)}, {distance:.2f} standard errors apart")
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
