"""Runs that are interrupted and finished give what a run in peace gives; benchmarks/soak.py does it at length."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parent.parent / "benchmarks" / "soak.py"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["extract", "match", "train", "fit"])
def test_a_run_killed_at_random_moments_ends_as_one_in_peace(stage: str) -> None:
    # In a process of its own: it forks, and torch's threads here would not survive that
    command = [sys.executable, str(SOAK), "--moments", "3", "--stages", stage, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["different"] == []
    assert sum(told["counts"].values()) == 3
