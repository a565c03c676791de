"""Broken files for every reader; `scripts/fuzz.py` with more of them is the same."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.mark.slow
def test_500_broken_files_are_read_right_or_named_in_a_line() -> None:
    command = [sys.executable, str(SCRIPTS / "fuzz.py"), "--inputs", "500", "--seed", "11"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-1000:]
    assert "500 inputs of 25 readers, seed 11: 0 faults" in ended.stdout


def test_an_input_is_the_same_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from mutations import mutated

    raw = b'{"a": [1, 2.5, {"b": null}], "c": "text"}\nstep,loss\n1,2\n'
    drawn = [mutated(raw, random.Random(f"0:x:{n}")) for n in range(300)]
    assert drawn == [mutated(raw, random.Random(f"0:x:{n}")) for n in range(300)]
    assert len({*drawn} - {raw}) > 200
