"""Run folders as values: what a run was (run.json), what it did (metrics.csv, full precision)."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from train.runs.belonging import config_of, identity_of, metrics_digest
from train.runs.exports import check_left
from train.runs.identity import Identity
from train.runs.metrics import Array, is_empty, read_metrics
from train.runs.record import checked_record, has_record

Curve = tuple[Array, Array]  # tokens seen, value at these tokens

SMOOTHING = 0.9  # weight of the past, per optimizer step


def ema(values: Iterable[float], smoothing: float = SMOOTHING) -> Array:
    """Exponential moving average that starts at the first value."""
    step = itertools.accumulate(values, lambda past, x: smoothing * past + (1 - smoothing) * x)
    return np.fromiter(step, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Run:
    """One run folder."""

    path: Path
    info: dict[str, Any]  # run.json
    metrics: dict[str, Array]  # one value per optimizer step; EMPTY where the cell was
    label: str = ""  # runs of one label differ in their seed alone
    config: dict[str, Any] | None = None  # config.yaml, where it has one

    @cached_property
    def identity(self) -> Identity:
        """What the run is; ValueError where its folder contradicts it."""
        return identity_of(self.path, self.info, self.config)

    @property
    def declared(self) -> tuple[str, ...]:
        """Fields in which it differs from others on purpose."""
        return tuple(self.info.get("declared") or ())

    @property
    def arm(self) -> str:
        """The label; the recipe's name where the label holds an override, which is then named."""
        return self.recipe if self.declared else self.label

    @property
    def seed(self) -> int:
        """Of its weights and batches."""
        return int(self.info["seed"])

    @property
    def recipe(self) -> str:
        """Its name."""
        return str(self.info["recipe"])

    @property
    def control(self) -> str | None:
        """What was done to this run to show the noise, if it is a control (optional key)."""
        return self.info.get("control")

    @property
    def status(self) -> str:
        """run.json's word, but a run whose last loss or any validation is not finite diverged."""
        train, val = self.metrics["train/loss"], self.metrics.get("val/loss", np.empty(0))
        evaluated = val[~is_empty(val)]
        train = train[~is_empty(train)]  # a curve of others may validate between
        infinite = not (np.isfinite(train[-1:]).all() and np.isfinite(evaluated).all())
        return "diverged" if infinite else str(self.info["status"])

    @property
    def tokens(self) -> int:
        """Seen so far."""
        seen = self.metrics["tokens_seen"]
        return int(seen[-1]) if len(seen) else 0

    @cached_property
    def train_curve(self) -> Curve:
        """Smoothed train loss; steps without a finite loss are left out of it."""
        tokens, loss = self._finite("train/loss")
        return tokens, ema(loss.tolist())

    @cached_property
    def val_curve(self) -> Curve:
        """Validation losses, where it validated."""
        return self._finite("val/loss")

    @property
    def last_validation(self) -> float | None:
        """The last one's loss; None without one, and where it is not finite: none before stands
        for it.
        """
        val = self.metrics.get("val/loss", np.empty(0))
        last = val[~is_empty(val)][-1:]
        return float(last[0]) if np.isfinite(last).any() else None

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the steps; None without one."""
        speed = self._finite("tokens_per_second")[1]
        return float(np.median(speed)) if len(speed) else None

    def _finite(self, column: str) -> Curve:
        if column not in self.metrics:
            return np.empty(0), np.empty(0)
        keep = np.isfinite(self.metrics[column])
        return self.metrics["tokens_seen"][keep], self.metrics[column][keep]


def read_run(path: Path) -> Run:
    """Its record and every step's metrics; ValueError for a folder that is not of this format."""
    info, config = checked_record(path), config_of(path)
    identity_of(path, info, config)  # before the metrics: it says which file is not the run's
    left = info.get("metrics", {}).get("sha256")
    if left is not None and info["status"] != "running" and left != metrics_digest(path):
        raise ValueError(f"{path}/metrics.csv is not what this run left: another run's, or changed")
    check_left(path, info)
    return Run(path, info, read_metrics(path / "metrics.csv", info["status"]), config=config)


def read_runs(paths: Sequence[Path], golden: Sequence[Run] = ()) -> list[Run]:
    """The runs of `paths`, labelled; a folder of runs stands for its runs, those of bf16 first.

    Imported `golden` runs come before them, under labels of their own: they are another sweep.
    """
    folders = [folder for path in paths for folder in _expand(path)]
    twice = {str(folder) for folder in folders if folders.count(folder) > 1}
    if twice:
        raise ValueError(f"given more than once: {', '.join(sorted(twice))}")
    kept = [replace(run, label=_with_parent(run)) for run in golden]
    runs = [read_run(folder) for folder in folders]
    for scheme in (_label, _with_parent, _names_of_copies(runs)):
        labelled = [*kept, *(replace(run, label=scheme(run)) for run in runs)]
        if len({(run.label, run.seed) for run in labelled}) == len(labelled):
            return labelled
    raise ValueError(f"run folders of one name and seed: {', '.join(map(str, folders))}")


def _with_parent(run: Run) -> str:
    return f"{run.path.resolve().parent.name}/{_label(run)}"


def _names_of_copies(runs: Sequence[Run]) -> Callable[[Run], str]:
    """The label, but the folder's name of runs that share theirs: the others stay as they are."""
    own = [(_label(run), run.seed) for run in runs]

    def label(run: Run) -> str:
        is_shared = own.count((_label(run), run.seed)) > 1
        is_copy = is_shared and _name(run) != f"{_label(run)}-s{run.seed}"
        return _name(run) if is_copy else _label(run)

    return label


def _expand(path: Path) -> list[Path]:
    if has_record(path):
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no such run folder: {path}")
    found = [Run(file.parent, checked_record(file.parent), {}) for file in path.glob("*/run.json")]
    if not found:
        raise FileNotFoundError(f"no run.json in {path} or in its folders: no run and no sweep")
    found.sort(key=lambda run: (run.recipe != "bf16" or bool(run.control), _label(run), run.seed))
    return [run.path for run in found]


def _label(run: Run) -> str:
    """`mxint8-b16` of the folder `mxint8-b16-s0`; the recipe's name of any other folder."""
    name, suffix = _name(run), f"-s{run.seed}"
    return name.removesuffix(suffix) if name.endswith(suffix) else run.recipe


def _name(run: Run) -> str:
    """Without control characters, which no picture can hold."""
    return "".join(c if c.isprintable() else "?" for c in run.path.resolve().name)
