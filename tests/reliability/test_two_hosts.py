"""Two hosts in network namespaces train together, and one is cut off."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_hosts_train_and_one_is_cut_off():
    done = subprocess.run(
        [sys.executable, "tests/reliability/two_hosts.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    if "skipped" in result:
        pytest.skip(result["skipped"])
    assert result["problems"] == []
    assert result["together"]["exit_codes"] == [0, 0]
    assert result["together"]["equal_losses"]
    assert result["cut"]["exit_codes"] == [1, 1]
