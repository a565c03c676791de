"""What a sweep consists of: recipes x overrides x seeds, from flags or from one YAML file."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from train.config.strict_yaml import read_yaml
from train.runs.names import checked_name

#: of `lowbit fit`, what the plan says of each run: no override moves one
PLANNED = ("run_dir", "seed_everything", "resume", "declared", "config")
KEYS = ("out", "config", "recipes", "seeds", "overrides", "settings")


@dataclass(frozen=True)
class Variant:
    """A recipe under an override; runs of one variant differ in their seed alone."""

    recipe_name: str
    override: str  # its name; empty for none
    recipe: Path
    changes: Mapping[str, Any] = field(hash=False)  # key of the configuration -> value

    @property
    def label(self) -> str:
        """The name of its run folders, less the seed."""
        return checked_name("-".join(filter(None, (self.recipe_name, self.override))))


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep."""

    variant: Variant
    seed: int
    out: Path
    arguments: tuple[str, ...]  # of `lowbit fit`

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return self.out / f"{self.variant.label}-s{self.seed}"

    def command(self, configs: tuple[Path, ...]) -> list[str]:
        """`lowbit fit` for it."""
        layers = [part for path in (*configs, self.variant.recipe) for part in ("-c", str(path))]
        if self.variant.changes:  # what `lowbit compare` names beside the recipe
            layers += ["--declared", json.dumps([*self.variant.changes])]
        own = ["--run_dir", str(self.folder), "--seed_everything", str(self.seed)]
        return ["fit", *layers, *own, *self.arguments]


@dataclass(frozen=True)
class SweepRequest:
    """What the user asked for; the first recipe is the baseline."""

    out: Path
    config: tuple[Path, ...]
    recipes: tuple[Path, ...]
    seeds: tuple[int, ...]
    overrides: Mapping[str, Mapping[str, Any]]  # name -> key of the configuration -> value
    arguments: tuple[str, ...]  # of every `lowbit fit`

    def __post_init__(self) -> None:
        names = [key for changes in self.overrides.values() for key in changes]
        names += [a[2:].partition("=")[0] for a in self.arguments if a.startswith("--")]
        if moved := [name for name in names if str(name).partition(".")[0] in PLANNED]:
            raise ValueError(f"{moved[0]} is the sweep's own: no override and no argument sets it")
        files = (*self.config, *self.recipes)
        if missing := [str(path) for path in files if not path.is_file()]:
            raise FileNotFoundError(f"no such file: {', '.join(missing)}")
        if not self.recipes or not self.seeds:
            raise ValueError("a sweep needs --recipes and at least one seed")
        names = self.recipe_names
        if len(set(names)) < len(names):
            raise ValueError(f"recipes must have different names, found {names}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must differ, found {list(self.seeds)}")

    @property
    def recipe_names(self) -> list[str]:
        """In their order, the baseline's first."""
        return [recipe_name(path) for path in self.recipes]

    def variants(self) -> list[Variant]:
        """Every recipe under every override."""
        overrides = self.overrides or {"": {}}
        return [
            Variant(recipe_name(recipe), override, recipe, changes)
            for (override, changes), recipe in product(overrides.items(), self.recipes)
        ]

    def runs(self) -> list[PlannedRun]:
        """Seed by seed, the baseline first."""
        return [
            PlannedRun(variant, seed, self.out, (*as_arguments(variant.changes), *self.arguments))
            for seed in self.seeds
            for variant in self.variants()
        ]


def recipe_name(recipe: Path) -> str:
    """The name of the policy in a recipe's YAML."""
    plain = read_yaml(recipe)
    try:
        return checked_name(str(plain["model"]["policy"]["name"]))
    except (KeyError, TypeError):
        raise ValueError(f"{recipe} is no recipe: it has no model.policy.name") from None


def as_arguments(changes: Mapping[str, Any]) -> tuple[str, ...]:
    """Arguments of `lowbit fit` from dotted keys and plain values, which JSON spells for YAML."""
    return tuple(
        part
        for key, value in changes.items()
        for part in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    )


def read_request(args: argparse.Namespace) -> SweepRequest:
    """The YAML file of the command line, then its flags, which win."""
    plain = _read_file(args.spec) if args.spec else {}
    flags = {key: getattr(args, key, None) for key in KEYS}
    plain |= {key: value for key, value in flags.items() if value is not None}
    if "out" not in plain:
        raise ValueError("a sweep needs --out, the folder of its run folders")
    return SweepRequest(
        out=Path(plain["out"]),
        config=tuple(map(Path, plain.get("config", []))),
        recipes=tuple(map(Path, plain.get("recipes", []))),
        seeds=tuple(plain.get("seeds", [0])),
        overrides=plain.get("overrides", {}),
        arguments=(*as_arguments(plain.get("settings", {})), *args.arguments),
    )


def _read_file(path: Path) -> dict[str, Any]:
    plain = read_yaml(path)
    kinds = dict.fromkeys(KEYS, list) | {"out": str, "overrides": dict, "settings": dict}
    if not isinstance(plain, dict) or (unknown := plain.keys() - kinds.keys()):
        found = sorted(map(str, unknown)) if isinstance(plain, dict) else type(plain).__name__
        raise ValueError(f"{path} holds {found}, expected some of {', '.join(KEYS)}")
    for key, value in plain.items():
        if not isinstance(value, kinds[key]):
            raise ValueError(f"{path}: {key} is {value!r}, expected a {kinds[key].__name__}")
    if not all(type(seed) is int for seed in plain.get("seeds", [])):
        raise ValueError(f"{path}: seeds are {plain['seeds']}, expected whole numbers")
    for name, changes in plain.get("overrides", {}).items():
        if not isinstance(changes, dict):
            raise ValueError(f"{path}: overrides.{name} is {changes!r}, expected {{key: value}}")
    return plain
