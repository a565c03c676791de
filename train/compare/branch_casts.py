"""casts.json: the weights that branches start from, evaluated under every arm's recipe."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np

from data.durable import write_durably
from data.plain import as_type, read_as, sealed
from train.stats.serial import window_mean

FORMAT_VERSION = 1
FILE = "casts.json"
FLOOR = "the baseline, its weights moved"


@dataclass(frozen=True)
class CastSet:
    """Plain data: a unit is a checkpoint, with windows, and the gap and KL of each by recipe."""

    baseline: str
    units: list[dict[str, Any]] = field(default_factory=list)
    format_version: int = FORMAT_VERSION

    def missing(self, digest: str, names: Sequence[str]) -> list[str]:
        """The recipes among `names` that the checkpoint was not yet evaluated under."""
        done = [unit["values"] for unit in self.units if unit["digest"] == digest]
        return [name for name in names if not any(name in values for values in done)]

    def with_unit(self, unit: dict[str, Any]) -> "CastSet":
        """Beside what the checkpoint has; ValueError if its windows are others."""
        own = [one for one in self.units if one["digest"] == unit["digest"]]
        if own and own[0]["windows"] != unit["windows"]:
            raise ValueError(f"casts of checkpoint {unit['checkpoint']}: other windows than before")
        if own:
            unit = own[0] | {"values": own[0]["values"] | unit["values"]}
        units = [one for one in self.units if one["digest"] != unit["digest"]]
        return replace(self, units=sorted([*units, unit], key=lambda one: one["checkpoint"]))

    def write(self, folder: Path) -> None:
        """Whole, or as it was."""
        write_durably(folder / FILE, json.dumps(sealed(asdict(self)), allow_nan=False) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """By recipe that all checkpoints have: means over checkpoints and windows.

        Every checkpoint sees the same windows, so that the error is that of each window's mean over
        them: a statement about these weights and text like this.
        """
        names = [
            name for name in (self.units[0]["values"] if self.units else ()) if self._has(name)
        ]
        return [{"recipe": name} | self._row(name) for name in names if name != self.baseline]

    def _has(self, name: str) -> bool:
        return all(name in unit["values"] for unit in self.units)

    def _row(self, name: str) -> dict[str, Any]:
        documents = self.units[0]["windows"]["documents"]
        row: dict[str, Any] = {"windows": len(documents), "checkpoints": len(self.units)}
        for column in ("gap", "kl"):
            values = np.array([unit["values"][name][column] for unit in self.units])
            found = window_mean(values.mean(axis=0), documents)
            row[column] = asdict(found.estimate)
            row["by"] = found.by
        return row


class _Values(TypedDict):
    gap: list[float]
    kl: list[float]


class _Windows(TypedDict):
    documents: list[int]


class _Unit(TypedDict):
    checkpoint: int
    digest: str
    windows: _Windows
    values: dict[str, _Values]


class _Written(TypedDict):
    units: list[_Unit]


def read_casts(folder: Path) -> CastSet | None:
    """What `folder` holds, if there are any."""
    path = folder / FILE
    if not path.exists():
        return None
    found = cast(CastSet, as_type(CastSet, read_as(_Written, path), str(path)))
    if found.format_version != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version is {found.format_version}, not {FORMAT_VERSION}")
    return found
