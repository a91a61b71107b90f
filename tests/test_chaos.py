"""Everything that can go wrong, at random, under load: `make chaos` does the same for longer."""

from __future__ import annotations

import subprocess
import sys

import pytest
from scenario import ROOT, environment


@pytest.mark.timeout(660)
def test_whatever_goes_wrong_only_what_a_killed_worker_held_is_lost() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.chaos", "--events", "1"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing else was lost" in done.stdout
