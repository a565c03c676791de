"""The README's commands parse, and what it names exists."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from train.cli import MODULES, VERBS, main
from train.fit.configuration import RunCLI
from train.plan.plan import PlanCLI

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^(?:torchrun .*?\$\(which lowbit\)|lowbit) (.*)$", README, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    verb, *arguments = shlex.split(command, comments=True)
    assert verb in VERBS
    monkeypatch.chdir(ROOT)
    if verb in ("fit", "plan"):
        cli = RunCLI if verb == "fit" else PlanCLI
        monkeypatch.setattr(cli, "instantiate_classes", lambda _: None)
        assert cli(verb, arguments).config.model.policy.name
        return
    called: list[Any] = []
    for module in MODULES.values():
        monkeypatch.setattr(f"{module}.run", lambda args: called.append(args) or 0)
    assert main([verb, *arguments]) == 0
    assert len(called) == 1


def test_paths_exist() -> None:
    for path in re.findall(r"\b(?:configs|scripts|docs)/[\w/.-]+\.\w+", README):
        assert (ROOT / path).exists(), path
