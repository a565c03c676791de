"""What two runs must share before their difference says anything about a recipe."""

import json
from collections.abc import Callable, Collection, Iterable
from typing import Any

from train.runs.run import Run

# where a model came from or by which version it was written is not what it is
NOT_THE_MODEL = {"_name_or_path", "transformers_version"}

SHARED_BY_ALL: dict[str, Callable[[Run], Any]] = {
    "data": lambda run: run.info["data"]["fingerprint"],
    "batch": lambda run: run.info["data"]["global_batch_size"],
    "seq_len": lambda run: run.info["data"]["seq_len"],
    "model": lambda run: {k: v for k, v in run.info["model"].items() if k not in NOT_THE_MODEL},
    "bf16_products": lambda run: run.info.get("bf16_products", "native"),  # none in old runs
    "max_steps": lambda run: run.info["max_steps"],
    "tokens": lambda run: run.tokens,
}
SHARED_BY_A_SEED: dict[str, Callable[[Run], Any]] = {
    "data_seed": lambda run: run.info["data"].get("seed"),
    "initial_weights": lambda run: run.info["initial_weights"],
}
SHARED_BY_A_LABEL: dict[str, Callable[[Run], Any]] = {
    "recipe_table": lambda run: run.info.get("recipe_table"),
}
FIELDS = (*SHARED_BY_ALL, *SHARED_BY_A_SEED, *SHARED_BY_A_LABEL)


def check_pairing(runs: list[Run], allow: Collection[str] = ()) -> list[str]:
    """Raise ValueError naming every mismatch; return those that `allow` lets pass.

    Diverged and failed runs stopped early and are shown all the same, so their tokens are their
    own; a control's initial weights are perturbed by design.
    """
    _check_independent(runs)
    found = list(_mismatches(runs))
    refused = [text for field, text in found if field not in allow]
    if refused:
        fields = " ".join(dict.fromkeys(field for field, _ in found))
        raise ValueError(f"{'; '.join(refused)} (to compare them anyway: --allow {fields})")
    return [text for _, text in found]


def _mismatches(runs: list[Run]) -> Iterable[tuple[str, str]]:
    for field, value in SHARED_BY_ALL.items():
        yield from _against_first(field, value, [run for run in runs if _has_own(run, field)])
    for group, fields in (("seed", SHARED_BY_A_SEED), ("label", SHARED_BY_A_LABEL)):
        for key in dict.fromkeys(getattr(run, group) for run in runs):
            members = [run for run in runs if getattr(run, group) == key]
            for field, value in fields.items():
                yield from _against_first(field, value, [r for r in members if _has_own(r, field)])


def _has_own(run: Run, field: str) -> bool:
    match field:
        case "tokens":
            return run.status in ("finished", "running")
        case "initial_weights":
            return run.control is None
    return True


def _against_first(
    field: str, value: Callable[[Run], Any], runs: list[Run]
) -> Iterable[tuple[str, str]]:
    for run in runs[1:]:
        name, first, other = _narrow(field, value(runs[0]), value(run))
        if first != other:
            first, other = json.dumps(first), json.dumps(other)
            yield field, f"{name} differs: {first} in {runs[0].path}, {other} in {run.path}"


def _narrow(name: str, first: Any, other: Any) -> tuple[str, Any, Any]:
    """Down to the first key in which two objects differ."""
    if isinstance(first, dict) and isinstance(other, dict):
        for key in [*first, *other]:
            if first.get(key) != other.get(key):
                return _narrow(f"{name}.{key}", first.get(key), other.get(key))
    return name, first, other


def _check_independent(runs: list[Run]) -> None:
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
