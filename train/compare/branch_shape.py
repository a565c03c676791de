"""What branches.json must be, down to its leaves."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from train.runs.identity import Identity


class Arm(TypedDict):
    """A recipe, perhaps under an override."""

    label: str
    recipe: str
    changes: dict[str, Any]
    control: str | None
    recipe_hash: NotRequired[str]  # of all that its steps compute with
    recipe_table: NotRequired[str]  # as in the identity of a run under it


class Point(TypedDict):
    """A checkpoint that branches begin at."""

    path: str
    step: int
    max_steps: int
    digest: str
    identity: NotRequired[dict[str, Any]]  # of its run


class Drawn(TypedDict):
    """Windows of the validation split, and the documents that they begin in."""

    ids: list[int]
    documents: list[int]


class Unit(TypedDict):
    """One branch of one checkpoint under all arms; null for an arm that diverged."""

    checkpoint: int
    branch: int
    seed: int
    validation_windows: int
    losses: dict[str, float | None]
    seconds: float
    windows: NotRequired[Drawn]
    window_losses: NotRequired[dict[str, list[float] | None]]
    weight_shifts: NotRequired[dict[str, list[float] | None]]  # by layer; of newer arms


class Written(TypedDict):
    """branches.json, as far as `BranchSet` does not say it."""

    arms: list[Arm]
    checkpoints: list[Point]
    units: list[Unit]


def check_units(found: Any, path: Path) -> None:
    """ValueError unless its units speak of its own checkpoints and arms."""
    labels = {arm["label"] for arm in found.arms}
    if found.baseline not in labels:
        raise ValueError(f"{path}: the baseline {found.baseline!r} is none of its arms")
    for unit in found.units:
        if not 0 <= unit["checkpoint"] < len(found.checkpoints):
            raise ValueError(f"{path}: a branch of checkpoint {unit['checkpoint']}, which it lacks")
        for losses in (unit["losses"], unit.get("window_losses", unit["losses"])):
            if not losses.keys() <= labels or found.baseline not in losses:
                raise ValueError(f"{path}: a branch with losses of {sorted(losses)}")


def check_distinct(checkpoints: list[dict[str, Any]]) -> None:
    """One checkpoint given twice, or that of a copied run, is one unit and not two."""
    seen: dict[str, str] = {}
    for checkpoint in checkpoints:
        first = seen.setdefault(checkpoint["digest"], checkpoint["path"])
        if first is not checkpoint["path"]:
            raise ValueError(f"{first} and {checkpoint['path']} hold the same checkpoint: give one")


def check_arms(found: Any, path: Path, runs: Iterable[tuple[str, Identity]]) -> None:
    """ValueError for an arm under another recipe than the run (label, identity) of its name."""
    tables = {arm["label"]: arm.get("recipe_table") for arm in found.arms}
    for label, run in runs:
        mine, theirs = tables.get(label), run.fields.get("recipe_table")
        if mine is not None and theirs is not None and mine != theirs:
            raise ValueError(
                f"{path}: its arm {label} has another recipe_table than the run of that name (to "
                "compare them anyway: --allow recipe_table)"
            )
