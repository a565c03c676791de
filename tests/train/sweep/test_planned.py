"""What a sweep plans for each run, no override and no argument moves."""

from pathlib import Path
from typing import Any

import pytest

from train.sweep.request import SweepRequest


@pytest.mark.parametrize(
    ("overrides", "arguments"),
    [
        ({"a": {"run_dir": "elsewhere"}}, ()),
        ({"a": {"model.optimization.lr": 1, "seed_everything": 5}}, ()),
        ({"a": {"resume": "never"}}, ()),
        ({}, ("--run_dir", "elsewhere")),
        ({}, ("--trainer.max_steps", "3", "--seed_everything=5")),
    ],
)
def test_a_run_cannot_be_moved(overrides: Any, arguments: tuple[str, ...], recipes: Path) -> None:
    with pytest.raises(ValueError, match="is the sweep's own"):
        SweepRequest(Path("out"), (), (recipes / "bf16.yaml",), (0,), overrides, arguments)
