"""Which classes a configuration may name: to name one is to import its module, which runs it.

Lightning's and torch's optimizers, and ours. Others are allowed on the command line, by the name of
their package, and never by a file: a configuration that one got from elsewhere runs no code.
"""

import hashlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.config.strict_yaml import YamlError

KNOWN = ("lightning.pytorch.", "torch.optim.", "train.", "transformers.LlamaConfig")
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def plugins_of(argv: Sequence[str]) -> tuple[str, ...]:
    """Packages that --plugins allows, with commas between; importable from the current folder."""
    found: list[str] = []
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, text = word.partition("=")
        if name == "--plugins":
            found += (text if equals else following).split(",")
    if wrong := [name for name in found if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", name)]:
        raise ValueError(f"--plugins {wrong[0][:40]!r}: expected names of packages, as in imports")
    here = str(Path.cwd())
    if found and here not in sys.path:
        sys.path.append(here)
    return tuple(f"{name}." for name in found)


def check_classes(value: Any, plugins: tuple[str, ...] = (), *, names: bool = False) -> None:
    """YamlError for a class of another package. `names`: a text that looks like one is one."""
    if isinstance(value, list):
        for item in value:
            check_classes(item, plugins, names=names)
    elif isinstance(value, dict):
        for key, item in value.items():
            if names and key == "logger":
                _check_logger(item, plugins)
                continue
            inside = key == "trainer" or (names and key != "default_root_dir")
            check_classes(item, plugins, names=inside or key == "class_path")
    elif names and isinstance(value, str) and _DOTTED.fullmatch(value):
        if not value.startswith((*KNOWN, *plugins)):
            package = value.partition(".")[0]
            raise YamlError(
                f"the class {value[:60]!r} is none of {', '.join(KNOWN)}; --plugins {package[:20]} "
                "on the command line allows it"
            )


def check_flags_classes(flags: Sequence[str], plugins: tuple[str, ...]) -> None:
    """The same for `--model.optimization.schedule package.Class`."""
    for flag, following in zip(flags, [*flags[1:], ""], strict=False):
        name, equals, text = flag.partition("=")
        if name in ("--model.optimization.optimizer", "--model.optimization.schedule"):
            check_classes(text if equals else following, plugins, names=True)


def source_hashes(plain: Any) -> dict[str, str]:
    """Class -> SHA-256 of the file it is in, for those of other packages; they are imported."""
    if isinstance(plain, list):
        return {k: v for item in plain for k, v in source_hashes(item).items()}
    if not isinstance(plain, dict):
        return {}
    found = source_hashes([*plain.values()])
    path = plain.get("class_path")
    if isinstance(path, str) and not path.startswith(KNOWN):
        file = getattr(sys.modules.get(path.rpartition(".")[0]), "__file__", None)
        if file is not None:
            found[path] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return found


def _check_logger(value: Any, plugins: tuple[str, ...]) -> None:
    """Its arguments are names of projects and folders, which may have dots."""
    for item in value if isinstance(value, list) else [value]:
        check_classes(item, plugins, names=not isinstance(item, dict))
