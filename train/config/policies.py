"""Policies of configurations: read from plain data, and true to a shipped name."""

from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from lowbit import LayerPolicy, QuantRecipe
from train.config.formats import check_formats  # which has YAML take them by name
from train.config.strict_yaml import read_yaml

SHIPPED = Path(__file__).parents[2] / "configs"  # beside the packages, in a checkout
BASELINE = "bf16"


def read_policy(plain: dict[str, Any]) -> LayerPolicy:
    """A policy from plain data, as config.yaml holds it."""
    check_formats(plain)
    parser = _parser()
    policy: LayerPolicy = parser.instantiate(parser.parse_object({"policy": plain})).policy
    return policy


@cache
def _parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--policy", type=LayerPolicy)
    return parser


def check_name(policy: LayerPolicy, control: str | None) -> None:
    """Raise ValueError if the policy bears a shipped recipe's name and is not that recipe."""
    recipes = (policy.recipe, *(rule.recipe for rule in policy.rules))
    if policy.name == BASELINE and (control or any(r != QuantRecipe() for r in recipes)):
        what = f"model.control={control}" if control else "quantized operands"
        raise ValueError(
            f"model.policy.name={BASELINE} with {what}: {BASELINE} is the baseline, which has none;"
            " give the policy another name"
        )
    for path in (SHIPPED / kind / f"{policy.name}.yaml" for kind in ("recipe", "control")):
        if path.is_file():
            model = read_yaml(path)["model"]
            differs = _differences(read_policy(model["policy"]), policy)
            if model.get("control") != control:
                differs.append(f"control ({model.get('control')} there, {control} here)")
            if differs:
                raise ValueError(
                    f"model.policy.name={policy.name} is that of configs/{path.parent.name}/"
                    f"{path.name}, from which this one differs in {', '.join(differs)}: give it"
                    " another name"
                )


def _differences(theirs: LayerPolicy, ours: LayerPolicy) -> list[str]:
    names = (field.name for field in fields(LayerPolicy))
    return [name for name in names if getattr(theirs, name) != getattr(ours, name)]
