"""Resume far inside a data set of two million samples: how long until its first step, what is read.

A program, started by test_far_resume.py and benchmarks/reliability.py; prints one JSON object.

    python tests/reliability/far_resume.py --sample 1000000
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook

from tests.toy import ToyData, toy_config
from xtuner_lite.runner.runner import Runner

GROUP = 8


class CountedData(ToyData):
    """Remembers which samples were read."""

    read: list[int] = []

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read.append(index)
        return super().__getitem__(index)


class FirstStep(Hook):
    """When the first step of a run ended; stops it there."""

    ended_at: float | None = None

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        FirstStep.ended_at = time.perf_counter()
        runner.train_loop.stop_training = True


def config(work_dir: Path, num_samples: int, **changes: Any) -> dict[str, Any]:
    """The toy on ``num_samples`` samples, 8 a step, shuffled."""
    options = dict(type=CountedData, size=num_samples)
    loader = toy_config(work_dir)["train_dataloader"]
    optim = toy_config(work_dir)["optim_wrapper"]
    return toy_config(
        work_dir,
        train_dataloader={**loader, "dataset": options, "batch_size": GROUP},
        optim_wrapper={**optim, "accumulative_counts": 1},
        custom_hooks=[FirstStep()],
        train_cfg=dict(max_epochs=1),
        **changes,
    )


def main() -> None:
    """Save a run that stands at ``--sample``, resume it, and print what that took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=1_000_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, step = Path(temporary), args.sample // GROUP
        # A run of one step, whose position is then set: a million samples are not trained here.
        runner = Runner.from_cfg(config(folder, 2 * args.sample))
        runner.train()
        runner.train_loop.start_from(step)
        runner.save_checkpoint()
        CountedData.read.clear()
        begin = time.perf_counter()
        resumed = Runner.from_cfg(config(folder, 2 * args.sample, resume=True))
        resumed.train()
        seconds = FirstStep.ended_at - begin
        plan = resumed.train_dataloader.plan
        expected = {int(i) for n in (step, step + 1, step + 2) for i in plan.samples_of_step(n)[1]}
        first = {int(i) for i in plan.samples_of_step(step)[1]}
    result = {
        "sample": args.sample,
        "seconds_to_the_end_of_the_first_step": round(seconds, 3),
        "samples_read": len(CountedData.read),
        "skipped_samples_read": len(set(CountedData.read) - expected),
        "first_step_is_right": first <= set(CountedData.read),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
