"""The kernels as other machines run them: built for their instructions."""

from collections.abc import Iterator

import pytest

from lowbit import kernels
from lowbit.kernels.cpu import build
from lowbit.kernels.cpu.library import library


@pytest.fixture(params=build.LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each level of LOWBIT_MARCH in turn, with the kernels built for it."""
    name: str = request.param
    if not build.LEVELS[name].runs_here:
        pytest.skip(f"this processor does not run {name}")
    monkeypatch.setenv("LOWBIT_MARCH", name)
    library.cache_clear()
    with kernels.using("require"):
        assert kernels.enabled()
        yield name
    library.cache_clear()
