"""Let one rank of a training fail in many ways: the run must end in time and name that rank.

A program, started by test_rank_failures.py and `make reliability`: it imports everything once and
forks the ranks of each trial. Prints one JSON object.

    python tests/reliability/rank_failures.py --trials 40 --seed 0
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft  # noqa: F401
import torch
import torch.distributed.tensor

from tests.reliability.fault_hook import Fault, FaultyWorkerData
from tests.reliability.forked_ranks import Outcome, run_forked
from tests.toy import toy_collate, toy_config
from xtuner_lite.runner.runner import Runner

TIMEOUT_S = 6.0
#: Beyond the time-out, a run may take this long to end.
SLACK_S = 5.0
NUM_STEPS = 400

#: The five kinds, and how each can happen.
KINDS = {
    "raises": ("raise",),
    "exits": ("sys_exit", "os_exit", "exit_0", "kill"),
    "hangs": ("sleep", "spin", "stop", "lock"),
    "loader worker": ("worker raise", "worker os_exit", "worker kill", "worker sleep"),
    "rank 0 only": ("main raise", "main sleep"),
}
STAGES = ("before_train_iter", "before_optimizer_step", "after_train_iter")


@dataclass
class Trial:
    """What goes wrong, on which rank, at which step and stage."""

    kind: str
    how: str
    rank: int
    step: int
    stage: str

    @classmethod
    def draw(cls, number: int, rng: random.Random) -> Trial:
        """Trial ``number``: the kinds and their ways in turn, the rest at random."""
        kind = list(KINDS)[number % len(KINDS)]
        ways = KINDS[kind]
        how = ways[number // len(KINDS) % len(ways)]
        rank = 0 if kind == "rank 0 only" else rng.randrange(2)
        return cls(kind, how, rank, rng.randint(1, 12), rng.choice(STAGES))


def train(rank: int, work_dir: Path, trial: Trial) -> None:
    """The training of one rank, in which ``trial.rank`` fails. The Runner reads its rank itself."""
    del rank
    how = trial.how.split()[-1]
    in_worker = trial.how.startswith("worker")
    data: dict[str, Any] = dict(type=FaultyWorkerData)
    loader: dict[str, Any] = dict(batch_size=2, collate_fn=dict(type=toy_collate))
    if in_worker:
        loader.update(num_workers=1)
        # Batch b of the run is read by rank b % 2; the step has 2 of them on each rank.
        data.update(kind=how, index=8 * (trial.step - 1) + 2 * trial.rank)
        loader.update(sampler=dict(type="EpochSampler", shuffle=False))
    config = toy_config(
        work_dir,
        train_dataloader=dict(dataset=data, **loader),
        train_cfg=dict(max_iters=NUM_STEPS),
        custom_hooks=[
            Fault(
                kind="none" if in_worker else how,
                rank=trial.rank,
                step=trial.step,
                stage=trial.stage,
                seconds_per_step=0.02,
            )
        ],
        env_cfg=dict(dist_cfg=dict(timeout=TIMEOUT_S), num_threads=1),
        strategy=dict(type="DDP"),
        launcher="pytorch",
    )
    Runner.from_cfg(config).train()


def verdict_on(trial: Trial, outcome: Outcome) -> str:
    """'' where the run ended as it should, else what is wrong."""
    how = trial.how.split()[-1]
    if outcome.code == 0:
        return "the exit code is 0"
    if outcome.seconds_after is None:
        return "the fault did not happen"
    if outcome.seconds_after > TIMEOUT_S + SLACK_S:
        return f"it took {outcome.seconds_after:.1f} s"
    if outcome.left_behind:
        return f"processes {outcome.left_behind} are left"
    named = re.findall(r"^xtuner[-_]lite: rank (\d+)", outcome.output, re.MULTILINE)
    if not named or set(named) != {str(trial.rank)}:
        return f"ranks {named} are named"
    shows = {"raise": "this error was injected", "sleep": "hang_here", "sys_exit": "sys.exit(3)"}
    if trial.how == "worker sleep":
        shows["sleep"] = "reading data"
    if how in shows and shows[how] not in outcome.output:
        return f"{shows[how]!r} is not shown"
    if how in ("raise", "sys_exit", "kill") and not trial.how.startswith("worker"):
        expected = {"raise": 1, "sys_exit": 3, "kill": 137}[how]
        if outcome.code != expected:
            return f"the exit code is {outcome.code}, not {expected}"
    return ""


def main() -> None:
    """Run the trials and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="run only this way to fail, e.g. 'worker sleep'")
    parser.add_argument("--verbose", action="store_true", help="print what each run printed")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a forked child has no OpenMP pool of its parent's
    rng = random.Random(args.seed)
    failures, seconds_over, ways = [], [], {}
    for number in range(args.trials):
        trial = Trial.draw(number, rng)
        if args.only:
            trial.how = args.only
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            body = partial(train, work_dir=folder / "run", trial=trial)
            outcome = run_forked(body, folder)
        verdict = verdict_on(trial, outcome)
        ways[trial.how] = ways.get(trial.how, 0) + 1
        seconds_over.append((outcome.seconds_after or 0.0) - TIMEOUT_S)
        if args.verbose:
            print(trial, outcome.code, outcome.seconds_after, verdict, outcome.output, sep="\n")
        if verdict:
            failures.append([number, str(trial), verdict, outcome.output[-2000:]])
    result = {
        "trials": args.trials,
        "passes": args.trials - len(failures),
        "failures": failures,
        "seed": args.seed,
        "timeout_s": TIMEOUT_S,
        "longest_seconds_over_the_timeout": round(max(seconds_over), 2),
        "ways": dict(sorted(ways.items())),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
