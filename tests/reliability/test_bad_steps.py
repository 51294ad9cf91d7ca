"""NaN, inf and huge values put into losses, gradients and data: caught before the update."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability.bad_steps import run_trials

ROOT = Path(__file__).parents[2]


def test_20_bad_steps_are_caught(tmp_path):
    result = run_trials(tmp_path, number=20, seed=1)
    assert result["failures"] == []
    assert result["trials"] == 20
    assert {"policy skip", "policy stop", "toy", "full", "lora"} <= set(result["kinds"])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_200_bad_steps_are_caught(ranks):
    command = [sys.executable, "tests/reliability/bad_steps.py", "--trials=200", f"--ranks={ranks}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["trials"], result["passes"], result["failures"]) == (200, 200, [])
