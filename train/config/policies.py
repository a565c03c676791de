"""Policies from plain data, as config.yaml and the recipes hold them."""

from typing import Any

from jsonargparse import ArgumentParser

from lowbit import LayerPolicy
from train.config import formats as formats  # by name, in YAML


def read_policy(plain: dict[str, Any]) -> LayerPolicy:
    """A policy from plain data, as config.yaml holds it."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--policy", type=LayerPolicy)
    policy: LayerPolicy = parser.instantiate(parser.parse_object({"policy": plain})).policy
    return policy
