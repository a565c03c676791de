"""What `lowbit` exports says what it is; `pytest lowbit` runs the examples."""

import inspect

import pytest

import lowbit


@pytest.mark.parametrize("name", lowbit.__all__)
def test_public_names_have_docstrings(name: str) -> None:
    thing = getattr(lowbit, name)
    assert inspect.getdoc(thing)
    if inspect.isclass(thing) and name != "Emulate":  # whose methods Backend documents
        members = inspect.getmembers(thing, lambda m: inspect.isfunction(m) or inspect.ismethod(m))
        ours = [(m, v) for m, v in members if v.__module__.startswith("lowbit")]
        missing = [m for m, value in ours if not m.startswith("_") and not inspect.getdoc(value)]
        assert not missing
