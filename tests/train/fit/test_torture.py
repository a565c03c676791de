"""Faults at random moments, a few of those of the scripts; docs/durability.md has what more did."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[3] / "scripts"


def run(*command: str) -> str:
    script, *arguments = command
    ended = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *arguments],
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-2000:]
    return ended.stdout


@pytest.mark.slow
def test_kills_and_io_faults_leave_nothing() -> None:
    """The script compares everything bit for bit with the undisturbed run."""
    out = run("torture.py", "--trials", "2", "--seed", "3", "--jobs", "process")
    assert out.count(": bit-equal") == 2 and "| all | 2 |" in out


@pytest.mark.slow
def test_a_rank_killed_before_the_others_met_it_is_named() -> None:
    out = run("rendezvous.py", "--kills", "6", "--seed", "1", "--patience", "8")
    assert "6 kills, seed 1: 0 wrong" in out
