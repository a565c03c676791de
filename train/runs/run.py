"""Run folders as values: what a run was (run.json), what it did (metrics.csv, full precision)."""

import io
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Curve = tuple[Array, Array]  # tokens seen, value at these tokens

FORMAT_VERSION = 1
REQUIRED = {"status", "recipe", "seed", "data", "model", "initial_weights", "max_steps"}
DATA_REQUIRED = {"fingerprint", "seq_len", "global_batch_size"}
STATUSES = ("running", "finished", "diverged", "failed")
SMOOTHING = 0.9  # weight of the past, per optimizer step


@dataclass(frozen=True)
class CastGap:
    """Validation loss of the baseline's final weights under a recipe, minus that of the baseline.

    No training noise: the standard error is that of the validation sample alone (over windows).
    """

    mean: float
    standard_error: float | None  # None of a single window
    windows: int
    tokens: int
    kl: float | None = None  # KL(baseline || recipe), nats per token, of FP32 logits
    kl_standard_error: float | None = None
    kl_floor: float | None = None  # the same for the baseline's own weights moved by 1e-6
    arithmetic: str = "logits rounded as under autocast"  # of files that do not say
    along: tuple[dict[str, Any], ...] = ()  # the same at each kept checkpoint, by tokens_seen


def write_cast_gaps(folder: Path, gaps: dict[str, CastGap]) -> None:
    """Leave `gaps` (by recipe name) in the baseline's run folder, where `lowbit compare` looks."""
    text = json.dumps({recipe: asdict(gap) for recipe, gap in gaps.items()}, indent=1)
    (folder / "cast_gap.json").write_text(text + "\n", encoding="utf-8")


def read_cast_gaps(folder: Path) -> dict[str, CastGap]:
    path = folder / "cast_gap.json"
    if not path.exists():
        return {}
    try:
        return {
            recipe: CastGap(**gap | {"along": tuple(gap.get("along", ()))})
            for recipe, gap in _read_json(path).items()
        }
    except TypeError as error:
        raise ValueError(f"{path}: not a cast gap: {error}") from None


def ema(values: Iterable[float], smoothing: float = SMOOTHING) -> Array:
    """Exponential moving average that starts at the first value."""
    step = itertools.accumulate(values, lambda past, x: smoothing * past + (1 - smoothing) * x)
    return np.fromiter(step, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Run:
    path: Path
    info: dict[str, Any]  # run.json
    metrics: dict[str, Array]  # one value per optimizer step; NaN where the cell was empty
    label: str = ""  # runs of one label differ in their seed alone

    @property
    def seed(self) -> int:
        return int(self.info["seed"])

    @property
    def recipe(self) -> str:
        return str(self.info["recipe"])

    @property
    def control(self) -> str | None:
        """What was done to this run to show the noise, if it is a control (optional key)."""
        return self.info.get("control")

    @property
    def status(self) -> str:
        """run.json's word, but a run whose last loss is not finite has diverged."""
        train, val = self.metrics["train/loss"], self.metrics.get("val/loss", np.empty(0))
        infinite = np.isinf(train[-1:]).any() or np.isinf(val).any() or np.isnan(train[-1:]).any()
        return "diverged" if infinite else str(self.info["status"])

    @property
    def tokens(self) -> int:
        seen = self.metrics["tokens_seen"]
        return int(seen[-1]) if len(seen) else 0

    @cached_property
    def train_curve(self) -> Curve:
        """Smoothed train loss; steps without a finite loss are left out of it."""
        tokens, loss = self._finite("train/loss")
        return tokens, ema(loss.tolist())

    @cached_property
    def val_curve(self) -> Curve:
        return self._finite("val/loss")

    @property
    def tokens_per_second(self) -> float | None:
        speed = self._finite("tokens_per_second")[1]
        return float(np.median(speed)) if len(speed) else None

    def _finite(self, column: str) -> Curve:
        if column not in self.metrics:
            return np.empty(0), np.empty(0)
        keep = np.isfinite(self.metrics[column])
        return self.metrics["tokens_seen"][keep], self.metrics[column][keep]


def run_status(folder: Path) -> str | None:
    """One of STATUSES; None where no run was begun."""
    path = folder / "run.json"
    return _read_json(path)["status"] if path.exists() else None


def read_run(path: Path) -> Run:
    info = _read_info(path)
    return Run(path, info, _read_metrics(path / "metrics.csv", info["status"]))


def _read_info(path: Path) -> dict[str, Any]:
    info = _read_json(path / "run.json")
    if info.get("format_version") != FORMAT_VERSION:
        found = info.get("format_version")
        raise ValueError(f"{path}: format_version is {found}, this lowbit reads {FORMAT_VERSION}")
    missing = (REQUIRED - info.keys()) | (DATA_REQUIRED - info.get("data", {}).keys())
    if missing:
        raise ValueError(f"{path}/run.json lacks {', '.join(sorted(missing))}")
    if info["status"] not in STATUSES:
        raise ValueError(f"{path}: status {info['status']!r} is none of {', '.join(STATUSES)}")
    return info


def _read_metrics(path: Path, status: str) -> dict[str, Array]:
    """Columns of metrics.csv; a run that stopped before its first step has none yet."""
    if status != "finished" and not path.exists():
        return {name: np.empty(0) for name in ("step", "tokens_seen", "train/loss")}
    header, _, body = path.read_text(encoding="utf-8").partition("\n")
    if status != "finished":  # the last row may be half written
        body = body[: body.rfind("\n") + 1]
    names = header.split(",")
    missing = {"step", "tokens_seen", "train/loss"} - {*names}
    if missing:
        raise ValueError(f"{path} lacks the column {', '.join(sorted(missing))}")
    for _ in range(2):  # ",,," holds two empty cells, of which one pass fills the first
        body = body.replace(",,", ",nan,")
    body = body.replace(",\n", ",nan\n") + ("nan" if body.endswith(",") else "")
    if not body.strip():
        return {name: np.empty(0) for name in names}
    try:
        table = np.loadtxt(io.StringIO(body), delimiter=",", ndmin=2)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if table.shape[1] != len(names):
        raise ValueError(
            f"{path}: {len(names)} columns in its header, {table.shape[1]} in its rows"
        )
    metrics = dict(zip(names, table.T.copy(), strict=True))
    if (np.diff(metrics["step"]) <= 0).any() or (np.diff(metrics["tokens_seen"]) <= 0).any():
        raise ValueError(f"{path}: steps or tokens_seen do not increase from row to row")
    return metrics


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}, not an object")
    return found


def read_runs(paths: Sequence[Path], golden: Sequence[Run] = ()) -> list[Run]:
    """The runs of `paths`, labelled; a folder of runs stands for its runs, those of bf16 first.

    Imported `golden` runs come before them.
    """
    folders = [folder for path in paths for folder in _expand(path)]
    twice = {str(folder) for folder in folders if folders.count(folder) > 1}
    if twice:
        raise ValueError(f"given more than once: {', '.join(sorted(twice))}")
    runs = [*golden, *(read_run(folder) for folder in folders)]
    for scheme in (_label, lambda run: f"{run.path.resolve().parent.name}/{_label(run)}", _name):
        labelled = [replace(run, label=scheme(run)) for run in runs]
        if len({(run.label, run.seed) for run in labelled}) == len(runs):
            return labelled
    raise ValueError(f"run folders of one name and seed: {', '.join(map(str, folders))}")


def _expand(path: Path) -> list[Path]:
    if (path / "run.json").exists():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no such run folder: {path}")
    found = [Run(file.parent, _read_info(file.parent), {}) for file in path.glob("*/run.json")]
    if not found:
        raise FileNotFoundError(f"no run.json in {path} or in its folders: no run and no sweep")
    found.sort(key=lambda run: (run.recipe != "bf16" or bool(run.control), _label(run), run.seed))
    return [run.path for run in found]


def _label(run: Run) -> str:
    """`mxint8-b16` of the folder `mxint8-b16-s0`; the recipe's name of any other folder."""
    name, suffix = _name(run), f"-s{run.seed}"
    return name.removesuffix(suffix) if name.endswith(suffix) else run.recipe


def _name(run: Run) -> str:
    return run.path.resolve().name
