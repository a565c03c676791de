"""A reader who follows a gradient into its quantizer passes six files at most."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
from lowbit import kernels
from lowbit.kernels import request

PACKAGE = Path(lowbit.__file__).parent
MOST_FILES = 6


@pytest.mark.skipif(not kernels.enabled(), reason="no compiler here")
def test_a_gradients_way_into_its_quantizer(monkeypatch: pytest.MonkeyPatch) -> None:
    ways: list[list[str]] = []
    operator = request._operator

    def noted(name: str, x: torch.Tensor) -> Callable[..., Any]:
        called = operator(name, x)
        files = [Path(frame.filename) for frame in traceback.extract_stack()]
        ours = [str(f.relative_to(PACKAGE)) for f in files if f.is_relative_to(PACKAGE)]
        ways.append([*ours, called.__module__])
        return called

    layer = torch.nn.Sequential(torch.nn.Linear(32, 32))
    lowbit.convert_linears(layer, lowbit.QuantRecipe.uniform("mxint8"), skip=())
    output = layer(torch.randn(4, 32))
    monkeypatch.setattr(request, "_operator", noted)
    output.sum().backward()
    assert len(ways) >= 2
    for way in ways:
        print(" -> ".join(dict.fromkeys(way)))
        assert len({*way}) <= MOST_FILES, way
