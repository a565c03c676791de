"""The verb in this process, and without its pictures."""

import argparse
from collections.abc import Callable

import pytest

from train.compare import compare


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take half a second each; test_report.py looks at them."""
    monkeypatch.setattr("train.compare.report.plot", lambda *_: None)


@pytest.fixture(scope="session")
def lowbit_compare() -> Callable[..., int]:
    """`lowbit compare` of these arguments, whose errors are raised."""

    def run(*arguments: object) -> int:
        parser = argparse.ArgumentParser()
        compare.add_arguments(parser)
        return compare.run(parser.parse_args([str(argument) for argument in arguments]))

    return run
