"""branches.json: the losses of all branches, and what follows from them."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from data.durable import write_durably
from train.compare.table import branch_lines
from train.stats.strata import estimate

FORMAT_VERSION = 1
FILE = "branches.json"


@dataclass(frozen=True)
class BranchSet:
    """Paired continuations of `checkpoints` under `arms`; plain data throughout."""

    baseline: str
    horizon: int
    arms: list[dict[str, Any]]  # label, recipe, changes, control
    checkpoints: list[dict[str, Any]]  # path, step, max_steps, digest
    origin: dict[str, Any]  # versions, machine, commit
    commands: list[str]
    units: list[dict[str, Any]] = field(default_factory=list)
    format_version: int = FORMAT_VERSION

    def has(self, checkpoint: int, branch: int) -> bool:
        return any((u["checkpoint"], u["branch"]) == (checkpoint, branch) for u in self.units)

    def with_unit(self, unit: dict[str, Any]) -> "BranchSet":
        """In order, whichever is done first."""
        units = sorted([*self.units, unit], key=lambda u: (u["branch"], u["checkpoint"]))
        return replace(self, units=units)

    def write(self, folder: Path) -> None:
        """Whole, or as it was."""
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / FILE, json.dumps(asdict(self), indent=1) + "\n")

    def gaps(self) -> dict[str, list[list[float]]]:
        """By label, then checkpoint: loss minus that of the baseline on the same batches."""
        labels = [arm["label"] for arm in self.arms if arm["label"] != self.baseline]
        return {
            label: [self._gaps(label, i) for i in range(len(self.checkpoints))] for label in labels
        }

    def _gaps(self, label: str, checkpoint: int) -> list[float]:
        own = [unit["losses"] for unit in self.units if unit["checkpoint"] == checkpoint]
        both = [(loss[self.baseline], loss[label]) for loss in own]
        return [b - a for a, b in both if a is not None and b is not None]

    @property
    def scope(self) -> str:
        steps = ", ".join(f"{c['step']} of {c['max_steps']}" for c in self.checkpoints)
        windows = max((unit["validation_windows"] for unit in self.units), default=0)
        return (
            f"Valid for these checkpoints (step {steps}) and this horizon ({self.horizon} steps):"
            f" val loss minus that of {self.baseline} on the same batches, both evaluated under"
            f" {self.baseline}'s numerics on {windows} validation windows"
        )

    def rows(self) -> list[dict[str, Any]]:
        """Per arm but the baseline: plain data."""
        controls = {arm["label"]: arm["control"] for arm in self.arms}
        return [
            {"label": label, "control": controls[label]}
            | asdict(found := estimate(strata))
            | {
                "verdict": found.verdict,
                "diverged": sum(unit["losses"][label] is None for unit in self.units),
                "checkpoint_means": [estimate([gaps]).mean if gaps else None for gaps in strata],
            }
            for label, strata in self.gaps().items()
        ]

    @property
    def seconds(self) -> float:
        return float(sum(unit["seconds"] for unit in self.units))

    def lines(self) -> list[str]:
        """For a person."""
        return branch_lines(self.document(Path()))

    def document(self, path: Path) -> dict[str, Any]:
        """What compare.json holds of it: plain data."""
        return {
            "path": str(path), "baseline": self.baseline, "horizon": self.horizon,
            "scope": self.scope, "seconds": self.seconds, "checkpoints": self.checkpoints,
            "rows": self.rows(), "commands": self.commands,
        }  # fmt: skip


def read_branches(folder: Path) -> BranchSet | None:
    """What `folder` holds, if it is a folder of branches."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        found = BranchSet(**plain)
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path} holds no branches: {error}") from None
    if found.format_version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version is {found.format_version}, this lowbit reads {FORMAT_VERSION}"
        )
    return found


def find_branches(path: Path) -> list[tuple[Path, BranchSet]]:
    """`path` itself, or the folders of branches in it."""
    folders = [path, *sorted(file.parent for file in path.glob(f"*/{FILE}"))]
    return [(folder, found) for folder in folders if (found := read_branches(folder))]
