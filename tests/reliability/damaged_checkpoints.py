"""Damage files of checkpoints; each damage must be found and the checkpoint before it be used.

A program, started by test_damaged_checkpoints.py and benchmarks/reliability.py. Two checkpoints of
a small training are made once; a trial damages one file in a copy of the newer one: a bit flipped,
cut short, grown, zeroed from somewhere on, deleted. It passes where verify_checkpoint names the
file and a resume takes the older checkpoint. Prints one JSON object.

    python tests/reliability/damaged_checkpoints.py --trials 1000 --seed 0
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from pathlib import Path

from tests.engine.strategies.same_run import train
from xtuner_lite.engine.checkpoint import (
    CheckpointError,
    list_checkpoints,
    newest_valid_checkpoint,
    verify_checkpoint,
)


def flip(path: Path, rng: random.Random) -> None:
    """One bit."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    """The end is missing, up to all of it."""
    os.truncate(path, rng.randrange(path.stat().st_size))


def grow(path: Path, rng: random.Random) -> None:
    """Bytes after the end."""
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.randint(1, 64)))


def delete(path: Path, rng: random.Random) -> None:
    """The file is gone."""
    path.unlink()


def zero(path: Path, rng: random.Random) -> None:
    """Zeros from somewhere on, as after a power cut without a flush."""
    data = path.read_bytes()
    at = rng.randrange(len(data))
    path.write_bytes(data[:at] + bytes(len(data) - at))


DAMAGES = {"flip": flip, "cut": cut, "grow": grow, "delete": delete, "zero": zero}


def one_trial(pristine: Path, work_dir: Path, rng: random.Random) -> tuple[str, str]:
    """(kind of damage, '' or what went wrong)."""
    older, newest = list_checkpoints(pristine)
    files = sorted(p.relative_to(newest) for p in newest.rglob("*") if p.is_file())
    victim, kind = rng.choice(files), rng.choice(tuple(DAMAGES))
    path = work_dir / "checkpoints" / newest.name / victim
    original = path.read_bytes()
    try:
        DAMAGES[kind](path, rng)
        if path.is_file() and path.read_bytes() == original:
            return kind, ""  # zeros over zeros: nothing was damaged
        try:
            verify_checkpoint(path.parents[len(victim.parts) - 1])
        except CheckpointError as error:
            if victim.name not in str(error):
                return kind, f"{kind} of {victim}: the error does not name the file: {error}"
        else:
            return kind, f"{kind} of {victim} was not found"
        warnings: list[str] = []
        used = newest_valid_checkpoint(work_dir, warnings.append)
        if used.name != older.name or len(warnings) != 1:
            return kind, f"{kind} of {victim}: {used.name} would be used, warnings {warnings}"
    finally:
        path.write_bytes(original)
    return kind, ""


def main() -> None:
    """Run the trials and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, begin, failures, kinds = random.Random(args.seed), time.monotonic(), [], {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        train(root / "run", None, lora=True, train_cfg=dict(max_iters=6))
        shutil.copytree(root / "run", root / "copy")
        for number in range(args.trials):
            kind, problem = one_trial(root / "run", root / "copy", rng)
            kinds[kind] = kinds.get(kind, 0) + 1
            if problem:
                failures.append([number, problem])
        verify_checkpoint(list_checkpoints(root / "copy")[-1])  # the trials put all back
    result = {
        "trials": args.trials,
        "passes": args.trials - len(failures),
        "failures": failures[:20],
        "seed": args.seed,
        "kinds": kinds,
        "seconds": round(time.monotonic() - begin),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
