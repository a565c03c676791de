"""SIGKILL at random moments; the same through scripts/torture.py with 25 kills."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts" / "torture.py"


@pytest.mark.slow
def test_sigkill_mid_step_mid_save_mid_validation() -> None:
    """Six kills; the script compares everything bit for bit with the uninterrupted run."""
    command = [sys.executable, "-P", str(SCRIPT), "--kills", "6", "--seed", "3"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-2000:]
    assert ended.stdout.count("killed; newest") == 6
    assert "bitwise equal" in ended.stdout
