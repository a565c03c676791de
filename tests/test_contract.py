"""What others depend on is still there: names of lowbit, verbs, flags and YAML keys, files.

`contract.json` was written by `current` before the rooms were made (commit 4f99648). It may grow;
an entry leaves it only with a word in CHANGELOG.md.
"""

import argparse
import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from train.cli import MODULES, VERBS

ROOT = Path(__file__).parents[1]
PUBLIC = ("", ".formats", ".stats", ".recipe", ".theory", ".gradient_stats", ".kernels")


def current(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """By kind, in alphabetical order."""
    found = {f"lowbit{name}": _names(importlib.import_module(f"lowbit{name}")) for name in PUBLIC}
    found["verbs"] = sorted(VERBS)
    for verb, module in MODULES.items():
        parser = argparse.ArgumentParser()
        importlib.import_module(module).add_arguments(parser)
        found[f"flags of {verb}"] = _flags(parser)
    from train.fit.configuration import RunCLI
    from train.plan.plan import PlanCLI

    example = ["-c", str(ROOT / "configs" / "model" / "quickstart.yaml")]
    example += ["-c", str(ROOT / "configs" / "recipe" / "mxint8.yaml")]
    for verb, cli in (("fit", RunCLI), ("validate", RunCLI), ("plan", PlanCLI)):
        monkeypatch.setattr(cli, "instantiate_classes", lambda _: None)
        found[f"flags of {verb}"] = _flags(cli(verb, example).parser)
    found["scripts"] = sorted(path.name for path in (ROOT / "scripts").glob("*.sh"))
    return found


def _names(module: ModuleType) -> list[str]:
    def is_own(name: str) -> bool:
        value = getattr(module, name)
        own = getattr(value, "__module__", module.__name__)
        return not isinstance(value, ModuleType) and own.startswith("lowbit")

    return sorted(name for name in vars(module) if not name.startswith("_") and is_own(name))


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    return sorted({flag for action in parser._actions for flag in action.option_strings})


def test_nothing_that_others_depend_on_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = json.loads((ROOT / "tests" / "contract.json").read_text())
    now = current(monkeypatch)
    gone = {kind: sorted({*names} - {*now.get(kind, [])}) for kind, names in kept.items()}
    assert {kind: names for kind, names in gone.items() if names} == {}
