"""What cheaper branches would buy: common random numbers, chosen windows, short horizons.

usage: python scripts/bench_units.py BRANCHES [--run CHECKPOINT] [--branches 8]
  BRANCHES: a folder of `lowbit sweep --branch-from`, whose kept window losses tell (b);
  --run: a checkpoint to run short branches from, for (a) and (c)
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lowbit import Randomness, bf16
from train.compare.branches import BranchSet, reread
from train.model.module import PretrainModule
from train.output.tables import aligned
from train.sweep.continuation import Continuation, build_module
from train.sweep.request import Variant
from train.sweep.units import BranchPoint

HORIZONS = (1, 5)
RECIPES = Path(__file__).parents[1] / "configs" / "recipe"
ARMS = ("bf16", "mxint8", "mxfp8", "ladder/mxint4", "ladder/nvfp4_stochastic",
        "disputes/nvfp4_signs_once_stochastic")  # fmt: skip
TARGET = 0.0003  # nats: the standard error that times are given for
INDEPENDENT = 1_000_003  # added to a branch's seed: other random numbers, same batches


def windows_table(found: BranchSet) -> list[tuple[str, ...]]:
    """(b): s.e. and |gap| / s.e. with all windows, every second, and the half that varies most.

    Those of an arm are chosen by the gaps of the other arms: of its own they would flatter it.
    """
    kept = [unit for unit in found.units if unit.get("window_losses")]
    gaps = {label: _window_gaps(kept, found.baseline, label) for label in found.gaps()}
    gaps = {label: own for label, own in gaps.items() if len(own)}
    names = ("all", "every second", "most varying")
    rows: list[tuple[str, ...]] = [("arm", *(f"s.e., {x}" for x in names), *names)]
    found_errors, ratios = [], []
    for label in gaps:
        spread = np.var([own.mean(0) for other, own in gaps.items() if other != label], axis=0)
        count = len(spread) // 2
        chosen = (np.arange(len(spread)), np.arange(0, len(spread), 2), np.argsort(-spread)[:count])
        cut = [_with_windows(found, kept, np.sort(own)) for own in chosen]
        own = [next(row for row in one.rows() if row["label"] == label) for one in cut]
        if own[0]["standard_error"]:
            errors = [f"{row['standard_error']:.5f}" for row in own]
            rows.append((label, *errors, *(f"{_ratio(row):.2f}" for row in own)))
            found_errors.append([row["standard_error"] / own[0]["standard_error"] for row in own])
            ratios.append([_ratio(row) / _ratio(own[0]) for row in own])
    medians = [f"x {x:.2f}" for both in (found_errors, ratios) for x in np.median(both, axis=0)]
    return [*rows, ("median over arms", *medians)]


def _window_gaps(units: list[dict[str, Any]], a: str, b: str) -> np.ndarray:
    both = [(unit["window_losses"].get(a), unit["window_losses"].get(b)) for unit in units]
    return np.array([np.subtract(y, x) for x, y in both if x and y])


def _with_windows(found: BranchSet, units: list[dict[str, Any]], chosen: np.ndarray) -> BranchSet:
    def cut(unit: dict[str, Any]) -> dict[str, Any]:
        losses = {k: v and np.take(v, chosen).tolist() for k, v in unit["window_losses"].items()}
        windows = {k: np.take(v, chosen).tolist() for k, v in unit["windows"].items()}
        means = {k: v and float(np.mean(v)) for k, v in losses.items()}
        return unit | {"window_losses": losses, "windows": windows, "losses": means}

    return replace(found, units=[cut(unit) for unit in units])


def _ratio(row: dict[str, Any]) -> float:
    return float(abs(row["mean"]) / row["standard_error"])


class Nested(Continuation):
    """Validated after several numbers of steps; with random numbers of its own, if told so."""

    other = 0  #: added to the seed of the random numbers

    def losses(self, module: PretrainModule, judge: PretrainModule) -> list[tuple[float, float]]:
        """At each horizon: the loss, and the seconds up to it, with one validation."""
        optimizer = self._restore(module)
        for layer in module.quantized_layers.values():
            layer.randomness = module.randomness = Randomness(self._seed + self.other)
        found, trained = [], 0.0
        for step in range(max(HORIZONS)):
            began = time.perf_counter()
            self._step(module, optimizer, step)
            trained += time.perf_counter() - began
            if step + 1 in HORIZONS:
                began = time.perf_counter()
                outcome = self._validate(module, judge, ())
                assert outcome is not None
                found.append((outcome.loss, trained + time.perf_counter() - began))
                module.train()
        return found


@bf16.everywhere()
def measured(checkpoint: Path, branches: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses and seconds [branch, arm, horizon]; the last arm twice, then on its own numbers."""
    point = BranchPoint.read(checkpoint)
    variants = [Variant(Path(arm).stem, "", RECIPES / f"{arm}.yaml", {}) for arm in ARMS]
    modules = [build_module(point.config, variant) for variant in (*variants, variants[-1])]
    judge, found = build_module(point.config, variants[0]), []
    for branch in range(branches):
        horizon = max(HORIZONS)
        run = Nested(checkpoint, point.config, point.seed(1000 + branch), horizon)
        rows = []
        for index, module in enumerate(modules):
            run.other = INDEPENDENT * (index == len(ARMS))
            rows.append(run.losses(module, judge))
        found.append(rows)
        print(f"{branch + 1} of {branches} branches", file=sys.stderr, flush=True)
    values = np.array(found)
    return values[..., 0], values[..., 1]


def horizon_table(losses: np.ndarray, seconds: np.ndarray) -> list[tuple[str, ...]]:
    """(c): what a branch of so few steps tells, and what a standard error of TARGET costs."""
    rows: list[tuple[str, ...]] = [
        ("arm", "steps", "gap ± s.e.", "spread", "s an arm", f"s to {TARGET}", "t in 100 s")
    ]
    for arm in range(1, len(ARMS)):
        for at, steps in enumerate(HORIZONS):
            gaps = losses[:, arm, at] - losses[:, 0, at]
            spread, cost = gaps.std(ddof=1), float(np.median(seconds[:, arm, at]))
            rows.append((
                Path(ARMS[arm]).stem, str(steps),
                f"{gaps.mean():+.6f} ± {spread / len(gaps) ** 0.5:.6f}", f"{spread:.6f}",
                f"{cost:.1f}", f"{cost * max(2.0, (spread / TARGET) ** 2):,.0f}",
                f"{abs(gaps.mean()) / spread * (100 / cost) ** 0.5:.2f}",
            ))  # fmt: skip
    return rows


def common_table(losses: np.ndarray) -> list[tuple[str, ...]]:
    """(a): spread of one stochastic arm minus another, with the same random numbers or others."""
    rows: list[tuple[str, ...]] = [("steps", "same random numbers", "others", "units saved")]
    for at, steps in enumerate(HORIZONS):
        first, same, other = (losses[:, arm, at] for arm in (-3, -2, -1))
        one, two = (same - first).std(ddof=1), (other - first).std(ddof=1)
        rows.append((str(steps), f"{one:.6f}", f"{two:.6f}", f"{1 - (one / two) ** 2:.0%}"))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="BRANCHES")
    parser.add_argument("--run", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--branches", type=int, default=8)
    args = parser.parse_args()
    print("(b) windows: standard error of the gap, then |gap| over it")
    print("\n".join(aligned(windows_table(reread(args.folder)), left=(0,))))
    if args.run:
        losses, seconds = measured(args.run, args.branches)
        print("\n(a) common random numbers: spread of stochastic arm minus stochastic arm")
        print("\n".join(aligned(common_table(losses), left=())))
        print("\n(c) short horizons")
        print("\n".join(aligned(horizon_table(losses, seconds), left=(0,))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
