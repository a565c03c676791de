"""branches.json: the losses of all branches, and what follows from them."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from data.durable import write_durably
from data.plain import as_type, read_as, sealed
from train.compare.branch_casts import read_casts
from train.compare.branch_shape import Written, check_distinct, check_units
from train.compare.branch_table import branch_lines, where
from train.compare.verdicts import chosen_pairs
from train.runs.belonging import foreign
from train.runs.identity import Identity
from train.stats.intervals import MIN_UNITS, Estimate, Part
from train.stats.serial import shared_part
from train.stats.strata import Strata, estimate, over_strata

FORMAT_VERSION = 1
FILE = "branches.json"


@dataclass(frozen=True)
class BranchSet:
    """Paired continuations of `checkpoints` under `arms`; plain data throughout."""

    baseline: str
    horizon: int
    arms: list[dict[str, Any]]  # of `Arm`
    checkpoints: list[dict[str, Any]]  # of `Point`
    origin: dict[str, Any]  # versions, machine, commit
    commands: list[str]
    units: list[dict[str, Any]] = field(default_factory=list)
    format_version: int = FORMAT_VERSION
    first_stage: int | None = None  # branches of each checkpoint that told how many there would be

    def check_belongs(self, path: Path, runs: Iterable[Identity]) -> None:
        """ValueError unless each checkpoint is of one of `runs`, or does not say of which."""
        runs = list(runs)
        for checkpoint in self.checkpoints:
            wrong = [foreign(checkpoint.get("identity"), run, segments=False) for run in runs]
            if wrong and all(wrong):
                first = min(wrong, key=len)[0]
                raise ValueError(f"{path}: {checkpoint['path']} is of none of these runs: {first}")

    def missing(self, checkpoint: int, branch: int, labels: Iterable[str]) -> tuple[str, ...]:
        """The arms among `labels` that this branch of this checkpoint lacks."""
        done = self._unit(checkpoint, branch)
        return tuple(label for label in labels if not done or label not in done["losses"])

    def _unit(self, checkpoint: int, branch: int) -> dict[str, Any] | None:
        found = [u for u in self.units if (u["checkpoint"], u["branch"]) == (checkpoint, branch)]
        return found[0] if found else None

    def with_unit(self, unit: dict[str, Any]) -> "BranchSet":
        """In order, whichever is done first; beside the arms that this branch has already."""
        done = self._unit(unit["checkpoint"], unit["branch"])
        units = [u for u in self.units if u is not done]
        units.append(both_units(done, unit) if done else unit)
        return replace(self, units=sorted(units, key=lambda u: (u["branch"], u["checkpoint"])))

    def write(self, folder: Path) -> None:
        """Whole, or as it was."""
        folder.mkdir(parents=True, exist_ok=True)
        plain = sealed(asdict(self))
        write_durably(folder / FILE, json.dumps(plain, indent=1, allow_nan=False) + "\n")

    def gaps(self, rounds: int | None = None) -> dict[str, Strata]:
        """By label, then checkpoint: loss minus that of the baseline on the same batches."""
        return {label: self._gaps(self.baseline, label, rounds) for label in self._others}

    @property
    def _others(self) -> list[str]:
        return [arm["label"] for arm in self.arms if arm["label"] != self.baseline]

    def _gaps(self, a: str, b: str, rounds: int | None = None) -> list[list[float]]:
        """Loss of `b` minus that of `a` by checkpoint, of the branches that neither lost."""
        strata: list[list[float]] = [[] for _ in self.checkpoints]
        for unit in self.units:
            ours, theirs = unit["losses"].get(a), unit["losses"].get(b)
            is_wanted = rounds is None or unit["branch"] < rounds
            if is_wanted and ours is not None and theirs is not None:
                strata[unit["checkpoint"]].append(theirs - ours)
        return strata

    def _shared(self, a: str, b: str) -> list[Part]:
        """What all these gaps have in common: their windows. Of branches that kept their losses."""
        kept = [u for u in self.units if None not in (u["losses"].get(a), u["losses"].get(b))]
        if not kept or any(unit.get("windows") != kept[0].get("windows") for unit in kept):
            return []
        windows = kept[0].get("windows")
        if windows is None:
            return []
        losses = [np.array([unit["window_losses"][x] for unit in kept]) for x in (a, b)]
        part = shared_part(losses[1] - losses[0], windows["documents"])
        return [part] if part else []

    def _shifts(self, a: str, b: str) -> list[list[float]]:
        """Of `b` less `a`, by checkpoint: mean over the layers of how their weights moved."""
        strata: list[list[float]] = [[] for _ in self.checkpoints]
        for unit in self.units:
            found = [unit.get("weight_shifts", {}).get(label) for label in (a, b)]
            if None not in found:
                strata[unit["checkpoint"]].append(float(np.mean(found[1]) - np.mean(found[0])))
        return strata

    @property
    def scope(self) -> str:
        """What the gaps hold for, in words."""
        steps = ", ".join(f"{where(c)} of {c['max_steps']}" for c in self.checkpoints)
        windows = max((unit["validation_windows"] for unit in self.units), default=0)
        return (
            f"Valid for these checkpoints ({steps}) and this horizon ({self.horizon} steps):"
            f" val loss minus that of {self.baseline} on the same batches, both evaluated under"
            f" {self.baseline}'s numerics on {windows} validation windows"
        )

    def rows(self) -> list[dict[str, Any]]:
        """Per arm but the baseline: plain data."""
        controls = {arm["label"]: arm["control"] for arm in self.arms}
        return [
            {"label": label, "control": controls[label]} | self._row(self.baseline, label)
            for label in self._others
        ]

    def pairs(self, planned: Sequence[tuple[str, str]] | None = None) -> list[dict[str, Any]]:
        """Arm `b` against arm `a`, neither the baseline: all, or those planned, each (b, a)."""
        labels = [self.baseline, *self._others]
        return [
            {"a": a, "b": b} | self._row(a, b)
            for a, b in chosen_pairs(labels, self.baseline, planned)
            if self.baseline not in (a, b)
        ]

    def _row(self, a: str, b: str) -> dict[str, Any]:
        gaps, shared = self._gaps(a, b), self._shared(a, b)
        found = estimate(gaps, shared, self.first_stage)
        own = [estimate([stratum]) if stratum else None for stratum in gaps]
        lost = self._diverged(a, b)
        verdict = found.verdict if found.why or self._few(gaps) is None else self._few(gaps)
        if lost:
            taken = sum(a in unit["losses"] and b in unit["losses"] for unit in self.units)
            verdict = f"{len(lost)} of {taken} diverged: no verdict"
        return asdict(found) | {
            "verdict": verdict,
            "diverged": len(lost),
            "lost": lost,
            "windows_variance": shared[0].variance if shared else None,
            "checkpoint_means": [one and one.mean for one in own],
            "checkpoint_errors": [one and one.standard_error for one in own],
            "checkpoint_units": [len(stratum) for stratum in gaps],
            "like_these": asdict(self._like_these(gaps, shared)),
            "weight_shift": asdict(estimate(self._shifts(a, b))),
        }

    def _few(self, gaps: Strata) -> str | None:
        """A spread of two is hardly known, where checkpoints may differ in it."""
        fewest = min((len(stratum) for stratum in gaps if len(stratum)), default=0)
        return f"{fewest} branches of a checkpoint: no verdict" if fewest < MIN_UNITS else None

    def _diverged(self, a: str, b: str) -> list[str]:
        """The branches that one of the two lost."""
        return [
            f"{label} from {where(self.checkpoints[unit['checkpoint']])}, branch {unit['branch']}"
            for unit in self.units
            for label in (a, b)
            if label in unit["losses"] and unit["losses"][label] is None
        ]

    def _like_these(self, gaps: Strata, shared: list[Part]) -> Estimate:
        """A statement about checkpoints like these: runs are its units, by their means."""
        runs: dict[Path, list[float]] = {}
        for checkpoint, stratum in zip(self.checkpoints, gaps, strict=True):
            if len(stratum):
                run = Path(checkpoint["path"]).parent.parent
                runs.setdefault(run, []).append(float(np.mean(stratum)))
        return over_strata([float(np.mean(means)) for means in runs.values()], shared)

    @property
    def seconds(self) -> float:
        """Of all units, added up."""
        return float(sum(unit["seconds"] for unit in self.units))

    def lines(self) -> list[str]:
        """For a person."""
        return branch_lines(self.document(Path()))

    def document(
        self, path: Path, planned: Sequence[tuple[str, str]] | None = None
    ) -> dict[str, Any]:
        """What compare.json holds of it: plain data."""
        casts = read_casts(path)
        return {
            "path": str(path), "baseline": self.baseline, "horizon": self.horizon,
            "scope": self.scope, "seconds": self.seconds, "checkpoints": self.checkpoints,
            "rows": self.rows(), "pairs": self.pairs(planned), "first_stage": self.first_stage,
            "commands": self.commands, "casts": casts.rows() if casts else [],
        }  # fmt: skip


def both_units(done: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """One branch whose arms came one after another; ValueError if they are no pairs."""
    for name in done["losses"].keys() & more["losses"].keys():
        if done["losses"][name] != more["losses"][name]:
            raise ValueError(
                f"branch {done['branch']} of checkpoint {done['checkpoint']}: {name} came out as"
                f" {done['losses'][name]} and as {more['losses'][name]}; same machine and threads?"
            )
    if done.get("windows") != more.get("windows"):
        raise ValueError(f"branch {done['branch']}: validated on other windows than before")
    merged: dict[str, Any] = {
        key: done[key] | more[key] for key in ("losses", "window_losses") if key in done
    }
    merged["weight_shifts"] = done.get("weight_shifts", {}) | more.get("weight_shifts", {})
    return done | merged | {"seconds": done["seconds"] + more["seconds"]}


def read_branches(folder: Path) -> BranchSet | None:
    """What `folder` holds, if it is a folder of branches."""
    path = folder / FILE
    if not path.exists():
        return None
    found = cast(BranchSet, as_type(BranchSet, read_as(Written, path), str(path)))
    check_units(found, path)
    if found.format_version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version is {found.format_version}, this lowbit reads {FORMAT_VERSION}"
        )
    check_distinct(found.checkpoints)
    return found


def reread(folder: Path) -> BranchSet:
    """What `folder`, which holds branches, holds now."""
    found = read_branches(folder)
    assert found is not None, folder
    return found


def find_branches(path: Path) -> list[tuple[Path, BranchSet]]:
    """`path` itself, or the folders of branches in it."""
    folders = [path, *sorted(file.parent for file in path.glob(f"*/{FILE}"))]
    return [(folder, found) for folder in folders if (found := read_branches(folder))]
