"""How often each rule of `lowbit compare` is wrong, design by design: docs/comparison.md's table.

usage: python scripts/simulate_errors.py [SIMULATIONS]     20,000 of each row by default

False: a difference is called where there is none. Power: an
effect of three true standard errors is called. Rows marked "no" break what the rule rests on.
"""

import sys
from collections.abc import Callable

import numpy as np
from simulated_rules import (
    CHECKED,
    Array,
    Found,
    by_documents,
    family,
    like_these,
    newey_west_rows,
    over_checkpoints,
    over_units,
    quantile,
    sign_flips,
    stein,
)

from train.output.tables import aligned
from train.stats.power import equivalent
from train.stats.strata import estimate

Draw = Callable[[np.random.Generator, tuple[int, ...]], Array]
EFFECT = 3.0  # true standard errors


def outliers(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    x = rng.standard_normal(shape) * np.where(rng.random(shape) < 0.05, 10, 1)
    scaled: Array = x / np.sqrt(0.95 + 0.05 * 100)
    return scaled


NOISE: dict[str, Draw] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "t3": lambda rng, shape: rng.standard_t(3, shape) / 3**0.5,
    "outliers (5 %, ten times)": outliers,
    "skew (exponential)": lambda rng, shape: rng.standard_exponential(shape) - 1,
}


def autoregressive(rng: np.random.Generator, runs: int, n: int, rho: float) -> Array:
    x = rng.standard_normal((runs, n))
    for i in range(1, n):
        x[:, i] = rho * x[:, i - 1] + (1 - rho**2) ** 0.5 * x[:, i]
    return x


Row = tuple[str, str, str, str, Array, Array | None]


def row(design: str, noise: str, rule: str, found: Found, error: float, holds: bool = True) -> Row:
    word = "yes" if holds else "no"
    return design, noise, rule, word, found.calls(), found.calls(EFFECT * error)


def rows(rng: np.random.Generator, runs: int) -> list[Row]:
    return [*seeds(rng, runs), *branches(rng, runs), *windows(rng, runs), *others(rng, runs)]


def seeds(rng: np.random.Generator, runs: int) -> list[Row]:
    found = []
    for noise, draw in NOISE.items():
        for n in (3, 5, 10):
            x = draw(rng, (runs, n))
            holds = noise in ("normal", "t3")  # outliers, symmetric: too seldom; skew: too often
            found.append(row(f"{n} seeds", noise, "t", over_units(x), n**-0.5, holds))
        x = draw(rng, (runs, 8))
        p = sign_flips(x)
        power = sign_flips(x + EFFECT * 8**-0.5) <= 0.05
        word = "no" if noise.startswith("skew") else "yes"
        found.append(("8 seeds", noise, "sign flips", word, p <= 0.05, power))
    x = rng.standard_normal((runs, 5)) + rng.standard_normal((runs, 1)) * 0.5
    found.append(row("5 seeds", "correlated, 0.2", "t", over_units(x), 0.5, holds=False))
    x = rng.standard_normal((runs, 5))
    kept = [x[:, :n] for n in (3, 4, 5)]  # as many as were left, whichever were lost
    calls = np.concatenate([over_units(part[i::3]).calls() for i, part in enumerate(kept)])
    seen = [over_units(part[i::3]).calls(EFFECT / 2) for i, part in enumerate(kept)]
    found.append(("5 seeds, up to 2 lost", "normal", "t", "yes", calls, np.concatenate(seen)))
    return found


def branches(rng: np.random.Generator, runs: int) -> list[Row]:
    found = []
    for spreads in ((1, 1, 1), (1, 3, 9), (1, 1, 5), (1, 1, 1, 1, 8)):
        for n in (3, 4, 6):
            scale = np.array(spreads, float)[:, None]
            x = rng.standard_normal((runs, len(spreads), n)) * scale
            error = float(np.sqrt((scale**2).sum() / n)) / len(spreads)
            what = f"{len(spreads)} checkpoints x {n}"
            noise = f"spreads {', '.join(map(str, spreads))}"
            found.append(row(what, noise, "Welch", over_checkpoints(x), error, n > 3))
    x = NOISE["t3"](rng, (runs, 3, 5))
    found.append(row("3 checkpoints x 5", "t3", "Welch", over_checkpoints(x), 15**-0.5, False))
    for shared in (1.0, 2.0):
        gaps = _with_windows(rng, runs, shared)
        x, error = gaps.mean(3), float(np.sqrt((1 + shared**2) / 15 + 1 / 64 / 15))
        noise = f"shared windows, {shared:g} x the error"
        bare = over_checkpoints(x)
        found.append(row("3 checkpoints x 5", noise, "Welch alone", bare, error, False))
        both = over_checkpoints(x, gaps)
        found.append(row("3 checkpoints x 5", noise, "Welch + windows", both, error))
    for runs_given in (3, 5):
        x = rng.standard_normal((runs, runs_given)) + rng.standard_normal((runs, runs_given)) / 2
        error = (1.25 / runs_given) ** 0.5
        found.append(row(f"{runs_given} runs", "normal", "like these", like_these(x), error))
    return found


def _with_windows(rng: np.random.Generator, runs: int, shared: float) -> Array:
    """Gaps of [3 checkpoints, 5 branches, 64 windows]; units of spread 1."""
    unit = rng.standard_normal((runs, 3, 5, 1)).astype(np.float32)
    window = rng.standard_normal((runs, 1, 1, 64)).astype(np.float32) * shared * (64 / 15) ** 0.5
    rest = rng.standard_normal((runs, 3, 5, 64)).astype(np.float32)
    gaps: Array = unit + window + rest
    return gaps


def windows(rng: np.random.Generator, runs: int) -> list[Row]:
    found = []
    for n in (64, 350):
        for rho in (0.0, 0.4, 0.7):
            error = float(np.sqrt((1 + rho) / (1 - rho) / n))
            nw = newey_west_rows(autoregressive(rng, runs, n, rho))
            text = f"neighbours {rho:g}"
            found.append(row(f"{n} windows", text, "Newey-West", nw, error, rho == 0 or n > 64))
    documents = np.repeat(np.arange(40), 10)
    x = rng.standard_normal((runs, 40))[:, documents] + rng.standard_normal((runs, 400))
    error = (1 / 40 + 1 / 400) ** 0.5
    found.append(
        row("40 documents", "half their own", "clusters", by_documents(x, documents), error)
    )
    two = rng.standard_normal((runs, 2))[:, np.repeat([0, 1], 175)] * 0.3
    x = two + rng.standard_normal((runs, 350))
    error = (0.09 / 2 + 1 / 350) ** 0.5
    found.append(
        row("2 documents", "as text like them", "Newey-West", newey_west_rows(x), error, False)
    )
    return found


def others(rng: np.random.Generator, runs: int) -> list[Row]:
    found: list[Row] = []
    for noise in ("normal", "t3"):
        for planned in (10, 40):
            result = stein(NOISE[noise](rng, (runs, planned)))
            holds = noise == "normal"
            what = f"--target-se, 4 of {planned} seeds"
            found.append(row(what, noise, "Stein", result, 12**-0.5, holds))
    for spreads in ([1.0] * 6, [1, 1, 1, 2, 4, 8], [4, 1, 1, 1, 1, 1]):
        for n in (3, 6):
            text = f"spreads {', '.join(f'{s:g}' for s in spreads)}"
            scale = np.array(spreads, float)[:, None]
            calls = family(rng.standard_normal((runs, len(spreads), n)) * scale)
            holds = spreads[0] == 1 and n > 2
            word = "yes" if holds else "no"
            found.append((f"5 recipes x {n} seeds", text, "Dunnett, any", word, calls, None))
    for n in (3, 6):
        x = rng.standard_normal((runs, n)) + 4.0  # a gap as large as the margin
        error = x.std(1, ddof=1) / n**0.5
        inside = np.abs(x.mean(1)) + quantile(n - 1, 0.95) * error < 4.0
        for i in range(CHECKED):
            assert equivalent(estimate([x[i].tolist()]), 4.0) == inside[i]
        none = x - 4.0
        power = np.abs(none.mean(1)) + quantile(n - 1, 0.95) * error < 4.0
        found.append((f"{n} seeds, margin 4 sd", "normal", "equivalent", "yes", inside, power))
        passed = x.mean(1) + quantile(n - 1) * error <= 4.0
        free = none.mean(1) + quantile(n - 1) * error <= 4.0
        found.append((f"{n} seeds, bound 4 sd", "normal", "--max-gap (2.5)", "yes", passed, free))
    return found


def main() -> int:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    table = [("design", "noise", "rule", "claims to hold", "false %", "coverage %", "power %")]
    for design, noise, rule, holds, false, power in rows(np.random.default_rng(2026), runs):
        share = 100 * false.mean()
        seen = "" if power is None else f"{100 * power.mean():.0f}"
        table.append((design, noise, rule, holds, f"{share:.1f}", f"{100 - share:.1f}", seen))
    print("\n".join(aligned(table, left=(0, 1, 2, 3))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
