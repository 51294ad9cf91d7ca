"""Kill training at random moments, resume it, and compare with an undisturbed run, bit for bit.

A program, started by test_kill_resume.py and `make test-slow`: it imports everything once and forks
each run, so that a trial costs a second. Prints one JSON object.

    python tests/reliability/kill_trials.py --trials 20 --seed 0 --mode lora
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from mmengine.hooks import Hook
from peft import LoraConfig

from tests.tiny import tiny_llama, tiny_tokenizer
from xtuner_lite.data.dataset import ChatDataset
from xtuner_lite.engine.checkpoint import CheckpointError, list_checkpoints, verify_checkpoint
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.runner.runner import Runner

NUM_STEPS = 10
SAVE_EVERY = 2


class NoisyChat(ChatDataset):
    """Random augmentation: some learnt tokens of each sample are masked, anew in every epoch."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        sample["labels"] = np.where(
            np.random.rand(len(sample["labels"])) < 0.1, -100, sample["labels"]
        )
        return sample


class StepLog(Hook):
    """One line per step, flushed at once: loss (as hex, so that every bit counts) and rows."""

    priority = "HIGHEST"

    def __init__(self, path: str) -> None:
        self.path = path

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        rows = [row for batch in data_batch for sample in batch["row_ids"] for row in sample]
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps([runner.iter + 1, float(outputs["loss"]).hex(), rows]) + "\n")


def rows(num: int = 24) -> list[dict]:
    """Short conversations, each different."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"Say {i}."},
                {"role": "assistant", "content": f"{i} " * (1 + i % 7)},
            ]
        }
        for i in range(num)
    ]


def train(work_dir: Path, log: Path, mode: str, resume: bool) -> None:
    """One run of NUM_STEPS optimizer steps in this process."""
    lora = (
        LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear") if mode == "lora" else None
    )
    runner = Runner(
        model=SupervisedFinetune(tiny_llama(attention_dropout=0.1), lora=lora, self_check=False),
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=NoisyChat(rows(), tokenizer=tiny_tokenizer(), max_length=64), batch_size=1
        ),
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=1e-2),
            dtype="fp32",
            accumulative_counts=2,
            clip_grad=dict(max_norm=1.0),
        ),
        param_scheduler=dict(type="WarmupCosineLR"),
        train_cfg=dict(max_iters=NUM_STEPS),
        randomness=dict(seed=3),
        default_hooks=dict(
            dataset_preview=None,
            loss_curve=None,
            trainability=None,
            checkpoint=dict(interval=SAVE_EVERY, max_keep_ckpts=2),
        ),
        custom_hooks=[StepLog(str(log))],
        resume=resume,
        log_level="ERROR",
    )
    runner.tokenizer = tiny_tokenizer()
    runner.train()


def in_a_fork(
    work_dir: Path, log: Path, mode: str, resume: bool, kill_after_s: float | None = None
) -> tuple[int, float]:
    """Run ``train`` in a child; returns (exit status, seconds). SIGKILL after ``kill_after_s``."""
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            train(work_dir, log, mode, resume)
            code = 0
        finally:
            os._exit(code)
    if kill_after_s is not None:
        time.sleep(max(0.0, kill_after_s - (time.monotonic() - begin)))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - begin


def read_log(log: Path) -> dict[int, list]:
    """step -> (loss, rows); a step that was done twice must have come out the same."""
    steps: dict[int, list] = {}
    for line in log.read_text().splitlines() if log.exists() else []:
        step, *entry = json.loads(line)
        assert steps.setdefault(step, entry) == entry, f"step {step} differs between attempts"
    return steps


def digest(work_dir: Path) -> str:
    """sha256 over the weights of the newest checkpoint."""
    newest = list_checkpoints(work_dir)[-1]
    verify_checkpoint(newest)
    files = sorted([*newest.glob("*.safetensors"), *newest.glob("trainer/*.safetensors")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def one_trial(folder: Path, mode: str, rng: random.Random, duration_s: float) -> str:
    """'killed N' where the trial did what it should, else what went wrong."""
    log = folder / "steps.jsonl"
    kills = rng.choice((1, 1, 2))
    for attempt in range(kills):
        in_a_fork(folder, log, mode, resume=attempt > 0, kill_after_s=rng.uniform(0.1, duration_s))
        saved = list_checkpoints(folder)
        for path in saved:
            try:
                verify_checkpoint(path)
            except CheckpointError as error:
                return f"a listed checkpoint is damaged after a kill: {error}"
        if len(read_log(log)) >= 2 * SAVE_EVERY and not saved:
            return "steps were done and no checkpoint exists"
    code, _ = in_a_fork(folder, log, mode, resume=True)
    return "killed" if code == 0 else f"the resumed run ended with code {code}"


def main() -> None:
    """Run the trials and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", choices=("lora", "full"), default="lora")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a forked child has no OpenMP pool of its parent's
    rng = random.Random(args.seed)
    failures = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        code, duration_s = in_a_fork(root / "whole", root / "whole.jsonl", args.mode, resume=False)
        assert code == 0, "the undisturbed run failed"
        expected, weights = read_log(root / "whole.jsonl"), digest(root / "whole")
        assert len(expected) == NUM_STEPS
        for number in range(args.trials):
            folder = root / f"trial{number}"
            folder.mkdir()
            verdict = one_trial(folder, args.mode, rng, duration_s)
            if verdict == "killed" and read_log(folder / "steps.jsonl") != expected:
                verdict = "losses or sample order differ"
            if verdict == "killed" and digest(folder) != weights:
                verdict = "final weights or optimizer state differ"
            if verdict != "killed":
                failures.append([number, verdict])
    result = {
        "trials": args.trials,
        "passes": args.trials - len(failures),
        "failures": failures,
        "seed": args.seed,
        "mode": args.mode,
        "run_s": round(duration_s, 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
