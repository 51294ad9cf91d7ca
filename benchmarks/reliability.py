"""Every reliability figure of the project, measured on this machine: writes reliability.json.

    make reliability                                   all of it, about an hour on 2 cores
    python benchmarks/reliability.py --scale 0.1       a tenth of the trials
    python benchmarks/reliability.py --only kills bad_steps

Each part is a program of tests/reliability, started in a process of its own, and prints what it
did; here they are put together with the versions they ran on. The exit code is 1 where a trial
failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STRATEGIES = ("single", "ddp", "fsdp2", "zero2", "zero3")
MODES = ("lora", "full")
PACKAGES = ("torch", "transformers", "peft", "deepspeed", "mmengine")


def run(program: str, *options: str) -> dict[str, Any]:
    """One program of tests/reliability; its last line is its result."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, f"tests/reliability/{program}.py", *options],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not lines:
        error = done.stderr.strip().splitlines()[-15:]
        return {"failed": f"exit code {done.returncode}", "stderr": error, "passes": 0}
    return {**json.loads(lines[-1]), "wall_s": round(time.monotonic() - begin)}


def kills(scale: float, seed: int) -> dict[str, Any]:
    """SIGKILL at random times and inside saves, then resume: bit-identical?"""
    each = max(1, round(30 * scale))
    parts = {}
    for number, strategy in enumerate(STRATEGIES):
        for mode in MODES:
            options = (f"--trials={each}", f"--seed={seed + number}", f"--strategy={strategy}")
            parts[f"{strategy} {mode}"] = run("kill_trials", *options, f"--mode={mode}")
            print(f"  kills, {strategy} {mode}: {parts[f'{strategy} {mode}']}", flush=True)
    return {
        "trials": each * len(parts),
        "passes": sum(part["passes"] for part in parts.values()),
        "parts": parts,
    }


def damages(scale: float, seed: int) -> dict[str, Any]:
    """Flipped, cut, grown, zeroed and deleted files of checkpoints: found?"""
    return run("damaged_checkpoints", f"--trials={round(1000 * scale)}", f"--seed={seed}")


def bad_steps(scale: float, seed: int) -> dict[str, Any]:
    """NaN, inf and spikes in losses, gradients and data: caught before the update?"""
    return run("bad_steps", f"--trials={round(200 * scale)}", f"--seed={seed}")


def rank_failures(scale: float, seed: int) -> dict[str, Any]:
    """Ranks that raise, exit, are killed, hang: over in time, the right one named?"""
    return run("rank_failures", f"--trials={max(5, round(40 * scale))}", f"--seed={seed}")


def far_resume(scale: float, seed: int) -> dict[str, Any]:
    """Resume at sample 1,000,000."""
    result = run("far_resume", "--sample=1000000")
    if "failed" not in result:
        fine = result["skipped_samples_read"] == 0 and result["first_step_is_right"]
        result |= {"trials": 1, "passes": int(fine)}
    return result


def two_hosts(scale: float, seed: int) -> dict[str, Any]:
    """Two hosts in network namespaces train together; then one is cut off (needs root)."""
    return run("two_hosts")


PARTS = {
    "kills": kills,
    "damages": damages,
    "bad_steps": bad_steps,
    "rank_failures": rank_failures,
    "far_resume": far_resume,
    "two_hosts": two_hosts,
}


def main() -> int:
    """Run the parts; 0 where every trial passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the trials")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--out", default="reliability.json")
    args = parser.parse_args()
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    result: dict[str, Any] = {"seed": args.seed, "versions": versions, "cores": os.cpu_count()}
    passed = True
    for name in args.only:
        begin = time.monotonic()
        result[name] = PARTS[name](args.scale, args.seed)
        passed &= result[name].get("trials", 1) == result[name]["passes"]
        line = {k: v for k, v in result[name].items() if k != "parts"}
        print(f"{name} ({time.monotonic() - begin:.0f} s): {line}", flush=True)
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
