"""scripts/: what runs all tests runs all of them."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.mark.parametrize("failing", ["", "1", "2", "3", "1 3"])
def test_every_tier_runs_whatever_failed_before(tmp_path: Path, failing: str) -> None:
    """A `pytest` that fails at the calls whose numbers are in `failing`."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPTS / "test.sh", tmp_path / "scripts")
    (tmp_path / "scripts" / "environment.sh").write_text("set -euo pipefail\n")
    fake = tmp_path / "pytest"
    fake.write_text(
        '#!/bin/sh\necho "$*" >> calls\n'
        f"for n in {failing}; do [ $n != $(wc -l < calls) ] || exit 1; done\n"
    )
    fake.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended = subprocess.run(
        ["scripts/test.sh", "-x"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == bool(failing)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 3 and all(call.endswith("-x") for call in calls)
    assert ended.stderr.count("test.sh: failed:") == len(failing.split())
