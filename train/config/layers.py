"""Configuration files one after another, then flags: what replaces what.

A mapping that is one value replaces what stood before, whole; the others are merged field by field:

- `model.policy` and `model.control`, together: a recipe of one file never mixes with another's;
- `model.llama` where it says how wide and deep the model is; with fewer fields it changes those;
- `model.llama.rope_parameters`, `diagnostics`, and whatever names a class (`class_path`);
- a format of a recipe and a list, as always.

Flags come after all files. One that changes a policy becomes part of its name.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from lowbit.recipe import OPERANDS
from train.config.strict_yaml import load_yaml

Plain = dict[str, Any]
WHOLE = (("model", "policy"), ("model", "llama", "rope_parameters"), ("diagnostics",))
ARCHITECTURE = {"hidden_size", "num_hidden_layers"}  # what every description of a model names
POLICY, CONTROL = "model.policy", "model.control"
FORMAT = {"name", "element"}  # what a format has, and no recipe
NO_NAME = "holds a model.policy or model.control without a model.policy.name: a file's replaces an"
NO_NAME += " earlier one whole (one option alone is changed on the command line)"


@dataclass
class Layers:
    """The files and policy flags of a command line as one configuration."""

    plain: Plain = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)  #: the others, as they came
    replaced: list[str] = field(default_factory=list)  #: what replaced what, in words
    _policy_of: str = ""  # the file whose policy stands

    VALUES: ClassVar = ("--model", f"--{POLICY}")  # flags that hold a mapping, as a file does

    @classmethod
    def read(cls, argv: Sequence[str]) -> "Layers":
        """ValueError or FileNotFoundError, naming the file or flag, for what cannot be read."""
        layers, changes = cls(), dict[str, Any]()
        for name, value in _words(argv):
            if name in ("-c", "--config"):
                layers.add(_read(value), value if len(value) < 80 else "-c")
            elif name in cls.VALUES:
                layers.add(_nested({name[2:]: _read(value)}), name)
            elif name == f"--{CONTROL}" or name.startswith(f"--{POLICY}."):
                changes[name[2:]] = value
            else:
                layers.flags += [name] if value is None else [value]
        layers.change(changes)
        return layers

    def add(self, above: Plain, source: str) -> None:
        """A file's configuration over what there is."""
        above = _nested(above)
        model = above.get("model")
        if isinstance(model, dict) and isinstance(get(model, "llama.init_args"), dict):
            model["llama"] = get(model, "llama.init_args")  # as config.yaml spells it
        if isinstance(model, dict) and model.keys() & {"policy", "control"}:
            policy = model.get("policy")
            if not isinstance(policy, dict) or policy.get("name") is None:
                raise ValueError(f"{source} {NO_NAME}")
            model |= {"control": model.get("control"), "policy": spelt_out(policy)}
            if before := get(self.plain, POLICY):
                self.replaced.append(
                    f"model.policy of {source} ({policy['name']}) replaces that of "
                    f"{self._policy_of} ({before['name']})"
                )
            self._policy_of = source
        self.plain = merged(self.plain, above)

    def change(self, changes: Mapping[str, str]) -> None:
        """Flags of the policy, by key; its name says what they changed."""
        before = deepcopy({key: get(self.plain, key) for key in (POLICY, CONTROL)})
        for key, text in changes.items():
            put(self.plain, key, text if key == f"{POLICY}.name" else load_yaml(text))
        policy = get(self.plain, POLICY)
        if not changes or not isinstance(policy, dict):
            return
        put(self.plain, POLICY, policy := spelt_out(policy))
        now = {POLICY: policy, CONTROL: get(self.plain, CONTROL)}
        if before[POLICY] and f"{POLICY}.name" not in changes and not _same(before, now):
            policy["name"] = changed_name(policy["name"], changes)

    def arguments(self) -> list[str]:
        """For jsonargparse."""
        return [*(["--config", _dump(self.plain)] if self.plain else []), *self.flags]


def _words(argv: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(option, its value) for those that are read here; (word, None) for the others."""
    words = iter(argv)
    for word in words:
        if word.startswith("-c") and len(word) > 2:
            yield "-c", word[2:].removeprefix("=")
            continue
        name, equals, value = word.partition("=")
        ours = name in ("-c", "--config", f"--{CONTROL}", *Layers.VALUES)
        if not ours and not name.startswith(f"--{POLICY}."):
            yield word, None
        elif equals:
            yield name, value
        elif (following := next(words, None)) is None:
            raise ValueError(f"{name} at the end of the command line: a value is missing")
        else:
            yield name, following


def _read(source: str) -> Plain:
    """A file, or the YAML of a mapping itself."""
    try:
        text = Path(source).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        if ":" not in source:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise FileNotFoundError(f"{source} cannot be read: {reason}") from None
        text, source = source, "a configuration on the command line"
    plain = load_yaml(text, source)
    if not isinstance(plain, dict):
        what = "is empty" if plain is None else f"holds {str(plain)[:40]!r}"
        raise ValueError(f"{source} {what}, expected a mapping such as `model: ...`")
    return plain


def _nested(plain: Plain) -> Plain:
    """`model.policy: x` as `model: {policy: x}`, down to what names a class."""
    if "class_path" in plain:
        return plain
    found: Plain = {}
    for key, value in plain.items():
        value = _nested(value) if isinstance(value, dict) else value
        for part in reversed(str(key).split(".")):
            key, value = part, {part: value}
        found = merged(found, value)
    return found


def merged(below: Plain, above: Plain, path: tuple[str, ...] = ()) -> Plain:
    """`above` over `below`."""
    found = dict(below)
    for key, value in above.items():
        place, old = (*path, key), below.get(key)
        if key.endswith("+") and isinstance(old, list) and isinstance(value, list):
            found[key] = old + value  # jsonargparse's way to lengthen a list
        elif isinstance(old, dict) and isinstance(value, dict) and not _is_whole(place, value):
            found[key] = merged(old, value, place)
        else:
            found[key] = value
    return found


def _is_whole(place: tuple[str, ...], value: Plain) -> bool:
    architecture = place == ("model", "llama") and value.keys() >= ARCHITECTURE
    return place in WHOLE or architecture or "class_path" in value


def spelt_out(policy: Plain) -> Plain:
    """With six operands where a recipe is a format: `recipe: mxint8`, a mapping of one, a file."""
    recipe, rules = policy.get("recipe"), policy.get("rules")
    policy = dict(policy)
    if isinstance(recipe, str) or (isinstance(recipe, dict) and recipe.keys() & FORMAT):
        policy["recipe"] = dict.fromkeys(OPERANDS, recipe)
    if isinstance(rules, list):
        policy["rules"] = [spelt_out(rule) if isinstance(rule, dict) else rule for rule in rules]
    return policy


def get(plain: Any, key: str) -> Any:
    """The value of a dotted key; None where there is none."""
    for part in key.split("."):
        plain = plain.get(part) if isinstance(plain, dict) else None
    return plain


def put(plain: Plain, key: str, value: Any) -> None:
    """Set a dotted key; ValueError where something on its way is no mapping."""
    *path, last = key.split(".")
    for index, part in enumerate(path):
        if plain.get(part) is None:
            plain[part] = {}
        plain = plain[part]
        if not isinstance(plain, dict):
            place = ".".join(path[: index + 1])
            raise ValueError(f"--{key}: {place} is {plain!r}, which has no fields; set it whole")
    plain[last] = value


def changed_name(name: str, changes: Mapping[str, Any]) -> str:
    """The policy's name with what was changed, as part of a path: `mxint8+keep_last=1`."""
    short = {re.sub(r"^model\.(policy\.)?(recipe\.)?", "", k): str(v) for k, v in changes.items()}
    parts = [
        # a minus of its own stays: -1 and 1 are two policies
        f"{k}={re.sub('[^A-Za-z0-9.-]+', ' ', v).strip().replace(' ', '-') or 'none'}"
        for k, v in short.items()
    ]
    found = "+".join([name, *parts])
    if len(found) > 64:
        found = f"{name[:48]}+{hashlib.sha256(found.encode()).hexdigest()[:12]}"
    return found


def _same(before: Plain, now: Plain) -> bool:
    """Whether two policies with their controls mean the same: one may name a default."""
    from train.config.policies import read_policy

    try:
        policies = [read_policy(each[POLICY]) for each in (before, now)]
    except Exception:  # what is wrong with either is said where it is used
        return before == now
    return policies[0] == policies[1] and before[CONTROL] == now[CONTROL]


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML is untyped
    """Strings in quotes: YAML 1.1 writes some bare that YAML 1.2 reads as numbers."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')
)


def _dump(plain: Plain) -> str:
    text: str = yaml.dump(plain, Dumper=_Dumper, sort_keys=False, width=100)
    return text
