"""YAML as configurations use it: plain data, numbers as in YAML 1.2, no key twice, no code."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import yaml

from data.plain import read_text

MAX_CHARACTERS = 1_000_000
MAX_DEPTH = 50
MAX_NODES = 100_000
_TAGS = {
    "null": (r"~|null|Null|NULL|", [*"~nN", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
}


class YamlError(yaml.YAMLError, ValueError):  # type: ignore[misc]
    """Not YAML, or not of the plain kind that configurations are."""


class _Loader(yaml.CSafeLoader):  # type: ignore[misc]  # PyYAML is untyped
    """Python's safe YAML 1.1, less what surprises: `no`, `0123`, dates, repeated keys."""

    yaml_implicit_resolvers: ClassVar[Any] = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict):
                raise YamlError(f"the key {key!r} is not plain{key_node.start_mark}")
            if key in seen:
                raise YamlError(f"the key {key!r} is there twice{key_node.start_mark}")
            seen.add(key)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


for _tag, (_pattern, _first) in _TAGS.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first
    )


def load_yaml(text: str, source: object = "") -> Any:
    """Plain data; YamlError with the line for anything else, and with the file it is from."""
    before = f"{source}: " if source else ""
    try:
        if len(text) > MAX_CHARACTERS:
            raise YamlError(f"{len(text)} characters of YAML: at most {MAX_CHARACTERS}")
        _check_shape(text)
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        # beside YAML's own: a number, a date or a tag that Python's constructor stumbles over
        raise YamlError(before + " ".join(str(error).split())) from None
    return value


def read_yaml(path: Path) -> Any:
    """A file of it."""
    return load_yaml(read_text(path), path)


def _check_shape(text: str) -> None:
    """Before anything is built: what nests too deep, and what aliases blow up."""
    depth, total = 0, 0
    sizes: dict[str, int] = {}  # of anchored nodes, their own aliases expanded
    open_anchors: list[tuple[str, int]] = []
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        size = 1 if isinstance(event, yaml.NodeEvent) else 0
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise YamlError(f"the alias *{event.anchor} contains itself{event.start_mark}")
            size = sizes[event.anchor]
        total += size
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            open_anchors.append((event.anchor, total))
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
            anchor, before = open_anchors.pop()
            sizes[anchor] = total - before + 1
        elif isinstance(event, yaml.ScalarEvent):
            sizes[event.anchor] = 1
        if depth > MAX_DEPTH or total > MAX_NODES:
            raise YamlError(
                f"nested deeper than {MAX_DEPTH}, or more than {MAX_NODES} nodes{event.start_mark}"
            )


def use_strict_yaml(check: Callable[[Any], None]) -> None:
    """Make jsonargparse read all files and arguments this way; `check` refuses by a YamlError."""
    from jsonargparse import set_loader

    def load_argument(text: str) -> Any:
        """Arguments are YAML too: `a:` and `{a, b}` there are text."""
        value = load_yaml(text)
        check(value)
        is_text = isinstance(value, dict) and value and all(v is None for v in value.values())
        return text if is_text and "\n" not in text.strip() else value

    set_loader("yaml", load_argument, exceptions=(yaml.YAMLError,))
