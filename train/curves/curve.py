"""`lowbit compare --curve NAME PATH key=value ...`: another trainer's run, from its curve."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from train.curves.tables import Columns, column, read_columns
from train.runs.metrics import EMPTY, checked_metrics
from train.runs.names import checked_name
from train.runs.run import Run

#: what a column may be -> names that are tried where none is given
USUAL = {
    "train": ("train/loss", "train_loss", "loss", "loss_metrics/global_avg_loss", "lm loss"),
    "val": ("val/loss", "val_loss", "validation_loss", "validation_metrics/loss", "eval/loss"),
    "tokens": ("tokens_seen", "n_tokens_seen", "consumed_tokens", "num_tokens"),
    "grad_norm": ("grad_norm", "grad-norm", "train/grad_norm"),
}
KEYS = (*USUAL, "step", "tokens_per_step", "seed")
OF_RUN = {"train": "train/loss", "val": "val/loss", "grad_norm": "grad_norm"}
FIRST = 0.01  #: nats by which the first losses of a pair may differ: seeds differ by more
MISSING = "initial weights, batches, architecture, optimization and precision"


@dataclass(frozen=True)
class CurveRequest:
    """A name, a file or folder, and which column is what."""

    name: str
    path: Path
    given: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, words: Sequence[str]) -> "CurveRequest":
        """From the words after --curve."""
        if len(words) < 2:
            raise ValueError(f"--curve {' '.join(words)}: expected NAME PATH [key=value ...]")
        name, path, *rest = words
        given = {}
        for word in rest:
            key, _, value = word.partition("=")
            if key not in KEYS or not value:
                raise ValueError(f"--curve {name}: {word[:40]!r}, expected {'=, '.join(KEYS)}=")
            given[key] = value
        for key in ("seed", "tokens_per_step"):
            if key in given and not given[key].isdigit():
                raise ValueError(f"--curve {name}: {key}={given[key][:20]}: expected a number")
        if given.get("tokens_per_step") == "0" or given.keys() >= {"tokens", "tokens_per_step"}:
            raise ValueError(f"--curve {name}: tokens= or tokens_per_step= above 0, one of them")
        return cls(checked_name(name), Path(path).expanduser(), given)

    def run(self) -> Run:
        """Its steps as a run's; ValueError where it has no loss, or steps go back."""
        columns = read_columns(self.path, self.given.get("step"))
        found = {
            key: column(columns, self.given.get(key), usual, self.path, key)
            for key, usual in USUAL.items()
        }
        if not found["train"] and not found["val"]:
            raise ValueError(
                f"{self.path} has no loss: name its column with train= or val=, of "
                f"{', '.join(list(columns)[:6])}"
            )
        metrics = self._metrics({k: v for k, v in found.items() if v})
        seed = int(self.given.get("seed", 0))
        info = {
            "format_version": 1, "status": "finished", "recipe": self.name, "control": None,
            "seed": seed, "data": {"seed": seed}, "initial_weights": None, "model": {},
            "command": [], "curve": str(self.path),
            "by": "tokens" if self._counts_tokens(found) else "steps",
        }  # fmt: skip
        return Run(self.path, info, metrics, label=self.name)

    def _counts_tokens(self, found: dict[str, Any]) -> bool:
        return bool(found.get("tokens")) or "tokens_per_step" in self.given

    def _metrics(self, found: Columns) -> dict[str, Any]:
        shift = 1 if 0 in found.get("train", {}) else 0  # a first update that has the number 0
        named = [each for key, each in found.items() if key != "tokens"]
        steps = sorted(s for s in {s for each in named for s in each} if s + shift > 0)
        tokens = [float(s + shift) * int(self.given.get("tokens_per_step", 1)) for s in steps]
        if "tokens" in found:
            if lost := [step for step in steps if step not in found["tokens"]]:
                raise ValueError(f"{self.path}: step {lost[0]} has a loss and no tokens")
            tokens = [found["tokens"][step] for step in steps]
        metrics = {"step": np.array(steps, float) + shift, "tokens_seen": np.array(tokens)}
        for key, name in OF_RUN.items():
            if key in found or key == "train":
                values = found.get(key, {})
                metrics[name] = np.array([values.get(step, EMPTY) for step in steps])
        return checked_metrics(metrics, self.path)


def curve_runs(requests: Sequence[CurveRequest], own: Sequence[Run]) -> list[Run]:
    """All on one axis with the runs of ours; ValueError where that is impossible."""
    runs = [request.run() for request in requests]
    axes = {run.info["by"] for run in runs} | ({"tokens"} if own else set())
    if len(axes) > 1:
        (first, *_) = [run.label for run in runs if run.info["by"] == "steps"]
        raise ValueError(
            f"--curve {first} counts steps, others tokens: give it tokens= or tokens_per_step="
        )
    seen: set[tuple[str, int]] = set()
    for run in [*own, *runs]:
        if (run.label, run.seed) in seen:
            raise ValueError(f"--curve {run.label}: there are two of seed {run.seed}; give seed=")
        seen.add((run.label, run.seed))
    return runs


def first_losses(runs: Sequence[Run]) -> list[tuple[Run, Run, float, float]]:
    """(first of the seed, other, their first train losses), where one of the two is a curve."""
    found = []
    of_seed: dict[int, Run] = {}
    for run in runs:
        first = of_seed.setdefault(run.seed, run)
        (at, loss), (there, other) = _first(first), _first(run)
        if first is not run and at == there == 1 and ("curve" in first.info or "curve" in run.info):
            found.append((first, run, loss, other))
    return found


def _first(run: Run) -> tuple[int, float]:
    """(step, loss) of the first row with a train loss; (0, 0) without one."""
    steps, losses = run.metrics["step"], run.metrics["train/loss"]
    for index in np.flatnonzero(np.isfinite(losses))[:1]:
        return int(steps[index]), float(losses[index])
    return 0, 0.0


def curve_notes(runs: Sequence[Run]) -> list[str]:
    """What of a pair nobody has recorded, and what was looked at instead."""
    foreign = [run for run in runs if "curve" in run.info]
    if not foreign:
        return []
    names = ", ".join(dict.fromkeys(run.label for run in foreign))
    axis = foreign[0].info["by"]
    beside = (
        ""
        if axis == "tokens"
        else " Rows are matched by steps: all counts of tokens here are steps."
    )
    compared = first_losses(runs)
    first = (
        "; their first losses agree with the baseline's to "
        f"{max(abs(a - b) for *_, a, b in compared):.1g}"
        if compared
        else "; none has a first step to compare"
    )
    return [
        f"Of other trainers: {names}. Whether {MISSING} are those of the baseline is not recorded: "
        f"that they are pairs rests on whoever made them{first}.{beside}"
    ]


def unlike_first_losses(runs: Sequence[Run]) -> list[str]:
    """Words for each that began elsewhere."""
    return [
        f"first_loss differs: {a:.6g} in {first.label} s{first.seed}, {b:.6g} in {run.label}, "
        "which began elsewhere or on other batches"
        for first, run, a, b in first_losses(runs)
        if abs(a - b) > FIRST
    ]
