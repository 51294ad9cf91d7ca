"""SIGKILL at random moments of a small run, then resume: equal to an undisturbed run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def trials(number, mode, seed=0):
    done = subprocess.run(
        [
            sys.executable,
            "tests/reliability/kill_trials.py",
            f"--trials={number}",
            f"--mode={mode}",
            f"--seed={seed}",
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_20_kills_resume_bit_identically():
    result = trials(20, "lora")
    assert result["failures"] == []
    assert result["passes"] == 20


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_100_kills_resume_bit_identically(mode):
    result = trials(100, mode, seed=1)
    assert (result["passes"], result["failures"]) == (100, [])
