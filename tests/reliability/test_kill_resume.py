"""SIGKILL at random moments of a small run, then resume: equal to an undisturbed run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def trials(number, strategy, mode, seed=0):
    done = subprocess.run(
        [
            sys.executable,
            "tests/reliability/kill_trials.py",
            f"--trials={number}",
            f"--strategy={strategy}",
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


@pytest.mark.parametrize(
    ("strategy", "number"), [("single", 20), pytest.param("fsdp2", 2, marks=pytest.mark.slow)]
)
def test_kills_resume_bit_identically(strategy, number):
    result = trials(number, strategy, "lora")
    assert result["failures"] == []
    assert result["passes"] == number


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2", "zero2", "zero3"])
def test_30_kills_resume_bit_identically(strategy, mode):
    result = trials(30, strategy, mode, seed=1)
    assert (result["passes"], result["failures"]) == (30, [])
