"""A resume reads nothing of what came before it."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_resume_in_the_middle_reads_no_skipped_sample():
    done = subprocess.run(
        [sys.executable, "tests/reliability/far_resume.py", "--sample=100000"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["skipped_samples_read"] == 0
    assert result["first_step_is_right"]
    assert 8 <= result["samples_read"] <= 24
