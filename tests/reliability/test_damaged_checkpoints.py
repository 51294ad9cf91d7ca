"""A sample of the damages; `make reliability` does a thousand."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_each_damage_is_found_and_named():
    done = subprocess.run(
        [sys.executable, "tests/reliability/damaged_checkpoints.py", "--trials=40"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["failures"] == []
    assert result["passes"] == 40
    assert len(result["kinds"]) == 5
