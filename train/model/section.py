"""The `model` section of a config.yaml as a module."""

from typing import Any

from jsonargparse import ArgumentParser

from train.config import formats as formats  # by name, in YAML
from train.config.classes import check_classes
from train.config.strict_yaml import use_strict_yaml
from train.model.module import PretrainModule


def read_module(plain: dict[str, Any]) -> PretrainModule:
    """A module from the `model` section of a config.yaml."""
    use_strict_yaml(check_classes)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PretrainModule, "model")
    module: PretrainModule = parser.instantiate(parser.parse_object({"model": plain})).model
    return module
