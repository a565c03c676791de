"""What two runs must share before their difference says anything about a recipe: their identities
say it, field by field.
"""

import argparse
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from train.curves.curve import unlike_first_losses
from train.runs.declaration import (
    ALIASES,
    DECLARATION,
    Group,
    any_covers,
    declared_key,
    group_of,
)
from train.runs.identity import Difference, text
from train.runs.run import Run

#: short names of --allow; any declared field has its own name besides
FIELDS = (*ALIASES, "bf16_products", "tokens", "initial_weights", "recipe_table")
FIRST_LOSS = "first_loss"  # of other trainers' curves, which have no other
_SHORT = {field: short for short, field in ALIASES.items()}


def allowed_field(name: str) -> str:
    """A field that --allow takes."""
    key = declared_key(name)
    free = key is not None and DECLARATION[key] in (Group.FREE, Group.NAMED)
    above = any(known.startswith(f"{name}.") for known in DECLARATION)
    if name in (*FIELDS, FIRST_LOSS) or above or (key is not None and not free):
        return name
    raise argparse.ArgumentTypeError(
        f"{name!r} is no field of a pair: {', '.join(FIELDS)}, or a key of config.yaml"
    )


def check_pairing(runs: Sequence[Run], allow: Collection[str] = ()) -> list[str]:
    """Raise ValueError naming every mismatch; return those that `allow` lets pass.

    What a run declared (a sweep its overrides) needs no leave: `Contrast` names it. Diverged and
    failed runs stopped early and are shown all the same, so their tokens are their own; a
    control's initial weights are perturbed by design.
    """
    _check_independent(runs)
    found = list(_mismatches(runs))
    refused = [words for field, words in found if not any_covers(allow, field)]
    if refused:
        fields = " ".join(dict.fromkeys(_SHORT.get(_named(field), field) for field, _ in found))
        shown, more = refused[:8], len(refused) - 8
        tail = f"; and {more} more" if more > 0 else ""
        raise ValueError(f"{'; '.join(shown)}{tail} (to compare them anyway: --allow {fields})")
    return [words for _, words in found]


def _named(field: str) -> str:
    """The key above it that has a short name, or the field."""
    return next((key for key in _SHORT if any_covers([key], field)), field)


def _mismatches(runs: Sequence[Run]) -> Iterable[tuple[str, str]]:
    finished = [run for run in runs if run.status in ("finished", "running")]
    for run in finished[1:]:
        if run.tokens != finished[0].tokens:
            difference = Difference("tokens", finished[0].tokens, run.tokens)
            yield "tokens", _words(difference, finished[0], run)
    yield from ((FIRST_LOSS, words) for words in unlike_first_losses(runs))
    for first, other in _against_first(runs, lambda run: None):
        yield from _between(first, other, Group.SHARED)
    for first, other in _against_first(runs, lambda run: run.seed):
        yield from _between(first, other, Group.SEED)
    for first, other in _against_first(runs, lambda run: run.label):
        yield from _between(first, other, Group.RECIPE)


def _against_first(runs: Sequence[Run], group: Any) -> Iterable[tuple[Run, Run]]:
    """Each run with the first of its group."""
    first: dict[Any, Run] = {}
    for run in runs:
        if first.setdefault(group(run), run) is not run:
            yield first[group(run)], run


def _between(first: Run, other: Run, group: Group) -> Iterable[tuple[str, str]]:
    own_weights = ["initial_weights"] if first.control or other.control else []
    declared = () if group is Group.RECIPE else (*first.declared, *other.declared)
    found = first.identity.differences(other.identity, group, but=(*declared, *own_weights))
    if group is Group.RECIPE and any(d.field == "recipe_table" for d in found):
        found = [d for d in found if d.field == "recipe_table"]  # which the others lead to
    for difference in found:
        yield difference.field, _words(difference, first, other)


def _words(difference: Difference, first: Run, other: Run) -> str:
    key = _named(difference.field)
    name = difference.field.replace(key, _SHORT.get(key, key), 1)
    values = text(difference.first), text(difference.other)
    return f"{name} differs: {values[0]} in {first.path}, {values[1]} in {other.path}"


def _check_independent(runs: Sequence[Run]) -> None:
    """Two seeds of a label are two samples only if the weights or the batches differ."""
    units: dict[Any, Run] = {}
    for run in runs:
        unit = (run.label, run.info["initial_weights"], run.info["data"].get("seed"))
        first = units.setdefault(unit, run)
        if first is not run:
            raise ValueError(
                f"seeds {first.seed} and {run.seed} of {run.label} are not independent: both start"
                f" from weights {run.info['initial_weights']} and read the batches of data seed"
                f" {run.info['data'].get('seed')}"
            )


_COPIED = ("train/loss", "grad_norm")


def check_copies(runs: Sequence[Run]) -> None:
    """ValueError for two seeds of a label whose curves are the same bits, as far as both go."""
    for a, b in combinations(runs, 2):
        if a.label == b.label and a.seed != b.seed and _same(a, b):
            raise ValueError(
                f"{a.path} and {b.path} are one run under two seeds: their losses are the same"
            )


def _same(a: Run, b: Run) -> bool:
    steps = min(len(a.metrics["step"]), len(b.metrics["step"]))
    columns = [name for name in _COPIED if name in a.metrics and name in b.metrics]
    pairs = [(a.metrics[name][:steps], b.metrics[name][:steps]) for name in columns]
    return steps > 0 and all(np.array_equal(x, y, equal_nan=True) for x, y in pairs)


# --- what a pair differs in besides ---------------------------------------------------------------


@dataclass(frozen=True)
class Contrast:
    """In what two arms of a comparison differ, for the sentence about them."""

    a: Run
    b: Run

    @property
    def beside(self) -> list[Difference]:
        """What is not the recipe: declared or allowed, or it had been refused."""
        control = ["initial_weights"] if self.a.control or self.b.control else []
        found = self.a.identity.differences(
            self.b.identity, Group.SHARED, Group.SEED, but=[*control, "seed_everything"]
        )
        same_seed = self.a.seed == self.b.seed
        return [d for d in found if same_seed or group_of(d.field) is not Group.SEED]

    @property
    def recipe(self) -> list[str]:
        """Fields of the recipe in which they differ."""
        return [d.field for d in self.a.identity.differences(self.b.identity, Group.RECIPE)]

    def named(self, label: str, values: Sequence[Any]) -> str:
        """The arm's name with what it differs in: `mxint8 at lr 0.02`."""
        pairs = zip((d.field for d in self.beside), values, strict=True)
        said = [f"{field.rpartition('.')[2]} {text(value)}" for field, value in pairs]
        return f"{label} at {', '.join(said)}" if said else label

    def plain(self) -> dict[str, Any]:
        """What compare.json holds of it."""
        beside = self.beside
        return {
            "a_name": self.named(self.a.arm, [d.first for d in beside]),
            "b_name": self.named(self.b.arm, [d.other for d in beside]),
            "differs": {d.field: [_plain(d.first), _plain(d.other)] for d in beside},
            "differs_in_recipe": self.recipe,
        }


def _plain(value: Any) -> Any:
    return value if type(value) in (type(None), bool, int, float, str) else text(value)


def contrast(a: dict[int, Run], b: dict[int, Run]) -> Contrast:
    """Of two labels' runs, by their first seed in common."""
    shared = [(a[seed], b[seed]) for seed in a if seed in b]
    return Contrast(*(shared[0] if shared else (next(iter(a.values())), next(iter(b.values())))))


def gathered(fields: Sequence[str]) -> str:
    """Names of one parent together.

    >>> gathered(["a.b.x", "a.b.y", "c"])
    'a.b.{x,y}, c'
    """
    children: dict[str, list[str]] = {}
    for field in fields:
        parent, _, last = field.rpartition(".")
        children.setdefault(parent, []).append(last)
    return ", ".join(
        ".".join(filter(None, (parent, last[0] if len(last) == 1 else f"{{{','.join(last)}}}")))
        for parent, last in children.items()
    )


def recipe_lines(result: dict[str, Any]) -> list[str]:
    """What each recipe is beside the baseline's, by its fields."""
    return [
        f"{pair['b']} differs from {pair['a']} in {gathered(pair['differs_in_recipe'])}."
        for pair in result["pairs"]
        if pair["a"] == result["baseline"] and pair["differs_in_recipe"]
    ]


def circumstances(runs: Sequence[Run]) -> list[str]:
    """A line for what differs and moves last digits, one for what older runs never recorded."""
    named: dict[str, dict[str, str]] = {}
    missing: dict[str, list[str]] = {}
    known = {key for run in runs for key in run.identity.keys()}
    for run in runs:
        for field, value in run.identity.part(Group.NAMED).items():
            named.setdefault(field, {})[f"{run.label} s{run.seed}"] = text(value)
        for key in known - run.identity.keys():
            missing.setdefault(f"{run.label} s{run.seed}", []).append(key)
    differ = [
        f"{field} ({', '.join(f'{value} in {_few(names)}' for value, names in by.items())})"
        for field, values in named.items()
        if len(by := _inverted(values)) > 1
    ]
    lines = [f"What may move last digits differs: {'; '.join(differ)}."] if differ else []
    ours = [run for run in runs if "curve" not in run.info]
    old = [f"{run.label} s{run.seed}" for run in ours if not run.info.get("identity")]
    if old:
        keys = sorted({key for name in old for key in missing.get(name, [])})
        rest = f"; they do not record {', '.join(keys)}" if keys else ""
        lines.append(f"Without an identity, of an older lowbit: {_few(old)}{rest}.")
    return lines


def _inverted(values: dict[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in values.items():
        found.setdefault(value, []).append(name)
    return found


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
