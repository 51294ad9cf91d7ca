"""One rank fails: the run ends in time, names that rank, and leaves no process behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def trials(number, *options):
    done = subprocess.run(
        [sys.executable, "tests/reliability/rank_failures.py", f"--trials={number}", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_one_failure_of_each_kind():
    result = trials(5, "--seed=2")
    assert result["failures"] == []
    assert result["passes"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_40_failures(seed):
    result = trials(40, f"--seed={seed}")
    assert result["failures"] == []
    assert result["passes"] == 40
    assert result["longest_seconds_over_the_timeout"] <= 5.0
    assert len(result["ways"]) >= 10
