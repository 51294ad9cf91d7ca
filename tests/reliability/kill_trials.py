"""Kill training at random moments, resume it, and compare with an undisturbed run, bit for bit.

A program, started by test_kill_resume.py and benchmarks/reliability.py: it imports everything once
and forks each run, so that a trial costs about a second. Prints one JSON object.

    python tests/reliability/kill_trials.py --trials 20 --seed 0 --strategy fsdp2 --mode lora

Half of the kills come at a random time, half inside a save. With two ranks either all are killed (a
power cut) or one of them, which must bring the other down.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from mmengine.hooks import Hook
from peft import LoraConfig

from tests.ranks import free_port
from tests.tiny import tiny_llama, tiny_tokenizer
from xtuner_lite.data.dataset import ChatDataset
from xtuner_lite.engine.checkpoint import CheckpointError, list_checkpoints, verify_checkpoint
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.runner.runner import Runner

#: Name -> (strategy of the config, ranks).
STRATEGIES = {
    "single": (None, 1),
    "ddp": (dict(type="DDP"), 2),
    "fsdp2": (dict(type="FSDP2"), 2),
    "zero2": (dict(type="DeepSpeed", config="zero2"), 2),
    "zero3": (dict(type="DeepSpeed", config="zero3"), 2),
}
#: A rank whose peer was killed must end within this.
END_S = 20.0
NUM_STEPS = 6
SAVE_EVERY = 2
#: Exit code that stands for a rank that had to be killed because it did not end.
HUNG = 999


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
        with open(f"{self.path}.{runner.rank}", "a", encoding="utf-8") as file:
            file.write(json.dumps([runner.iter + 1, float(outputs["loss"]).hex(), rows]) + "\n")


@dataclass(frozen=True)
class Kill:
    """When a run is killed: ``after_s`` from its start, or from the start of its save ``save``.

    ``ranks``: which ones get SIGKILL.
    """

    after_s: float
    save: int | None
    ranks: tuple[int, ...]


class KillInsideSave(Hook):
    """SIGKILL to this process some time after its ``save``-th save began."""

    def __init__(self, kill: Kill) -> None:
        self.kill, self.saves = kill, 0

    def before_save_checkpoint(self, runner, checkpoint):
        self.saves += 1
        if self.saves == self.kill.save and runner.rank in self.kill.ranks:
            threading.Timer(self.kill.after_s, os.kill, (os.getpid(), signal.SIGKILL)).start()


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


def train(
    work_dir: Path, log: Path, strategy: str, mode: str, resume: bool, kill: Kill | None
) -> None:
    """One run of NUM_STEPS optimizer steps in this process."""
    lora = (
        LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear") if mode == "lora" else None
    )
    torch.manual_seed(11)
    section, world_size = STRATEGIES[strategy]
    hooks: list[Hook] = [StepLog(str(log))]
    if kill is not None and kill.save is not None:
        hooks.append(KillInsideSave(kill))
    runner = Runner(
        model=SupervisedFinetune(tiny_llama(attention_dropout=0.1), lora=lora, self_check=False),
        work_dir=str(work_dir),
        strategy=section,
        launcher="pytorch" if world_size > 1 else "none",
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
        custom_hooks=hooks,
        env_cfg=dict(dist_cfg=dict(timeout=10)),
        resume=resume,
        log_level="ERROR",
    )
    runner.tokenizer = tiny_tokenizer()
    runner.train()


def in_forks(
    work_dir: Path, log: Path, strategy: str, mode: str, *, resume: bool, kill: Kill | None = None
) -> tuple[list[int], float]:
    """Run ``train`` in a child per rank; returns (exit codes, seconds)."""
    world_size = STRATEGIES[strategy][1]
    begin, port, children = time.monotonic(), free_port(), []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            _be_rank(
                rank, world_size, port, lambda: train(work_dir, log, strategy, mode, resume, kill)
            )
        children.append(child)
    if kill is not None and kill.save is None:
        time.sleep(max(0.0, kill.after_s - (time.monotonic() - begin)))
        for rank in kill.ranks:
            os.kill(children[rank], signal.SIGKILL)
    codes = [None] * world_size
    deadline = None
    while None in codes:
        for rank, child in enumerate(children):
            if codes[rank] is None:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                    if codes[rank] != 0 and deadline is None:
                        deadline = time.monotonic() + END_S
        if deadline is not None and time.monotonic() > deadline:
            for rank, child in enumerate(children):
                if codes[rank] is None:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    codes[rank] = HUNG
        time.sleep(0.005)
    return codes, time.monotonic() - begin


def _be_rank(rank: int, world_size: int, port: int, body) -> None:
    code = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        if "KILL_TRIALS_SHOW" not in os.environ:
            os.dup2(null, 2)
        if world_size > 1:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
            )  # fmt: skip
        body()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def read_log(log: Path, strategy: str) -> list[dict[int, list]]:
    """Per rank: step -> (loss, rows); a step that was done twice must have come out the same."""
    ranks = []
    for rank in range(STRATEGIES[strategy][1]):
        path = Path(f"{log}.{rank}")
        steps: dict[int, list] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            step, *entry = json.loads(line)
            assert steps.setdefault(step, entry) == entry, f"step {step} differs between attempts"
        ranks.append(steps)
    return ranks


def digest(work_dir: Path) -> str:
    """sha256 over the weights and the optimizer state of the newest checkpoint."""
    newest = list_checkpoints(work_dir)[-1]
    verify_checkpoint(newest)
    files = sorted([*newest.glob("*.safetensors"), *newest.glob("trainer/pieces_*")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def one_trial(folder: Path, strategy: str, mode: str, rng: random.Random, duration_s: float) -> str:
    """'killed' where the trial did what it should, else what went wrong."""
    log, world_size = folder / "steps.jsonl", STRATEGIES[strategy][1]
    for attempt in range(rng.choice((1, 1, 2))):
        ranks = tuple(range(world_size))
        if world_size > 1 and rng.random() < 0.5:
            ranks = (rng.choice(ranks),)
        if rng.random() < 0.5:
            kill = Kill(rng.uniform(0.0, 0.06), rng.randint(1, NUM_STEPS // SAVE_EVERY), ranks)
        else:
            kill = Kill(rng.uniform(0.1, duration_s), None, ranks)
        codes, _ = in_forks(folder, log, strategy, mode, resume=attempt > 0, kill=kill)
        if HUNG in codes:
            return f"a rank still ran {END_S} s after the other was killed ({kill})"
        saved = list_checkpoints(folder)
        for path in saved:
            try:
                verify_checkpoint(path)
            except CheckpointError as error:
                return f"a listed checkpoint is damaged after a kill: {error}"
        done = max((max(steps, default=0) for steps in read_log(log, strategy)), default=0)
        if done > SAVE_EVERY and not saved:
            return "steps were done and no checkpoint exists"
    codes, _ = in_forks(folder, log, strategy, mode, resume=True)
    return "killed" if codes == [0] * world_size else f"the resumed run ended with codes {codes}"


def main() -> None:
    """Run the trials and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategy", choices=tuple(STRATEGIES), default="single")
    parser.add_argument("--mode", choices=("lora", "full"), default="lora")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a forked child has no OpenMP pool of its parent's
    if args.strategy.startswith("zero"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed  # noqa: F401  once, before the forks
    rng = random.Random(args.seed)
    failures, what = [], (args.strategy, args.mode)
    begin = time.monotonic()
    # In memory where possible: a SIGKILL loses nothing that was written, and fsync costs nothing.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as temporary:
        root = Path(temporary)
        (root / "whole").mkdir()
        # Once in this process, so that its forks find every module imported and every table built.
        train(root / "warm", root / "warm.jsonl", "single", args.mode, resume=False, kill=None)
        codes, duration_s = in_forks(root / "whole", root / "whole.jsonl", *what, resume=False)
        assert set(codes) == {0}, f"the undisturbed run failed: {codes}"
        expected, weights = read_log(root / "whole.jsonl", args.strategy), digest(root / "whole")
        assert all(len(steps) == NUM_STEPS for steps in expected)
        for number in range(args.trials):
            folder = root / f"trial{number}"
            folder.mkdir()
            verdict = one_trial(folder, *what, rng, duration_s)
            if verdict == "killed" and read_log(folder / "steps.jsonl", args.strategy) != expected:
                verdict = "losses or sample order differ"
            if verdict == "killed" and digest(folder) != weights:
                verdict = "final weights or optimizer state differ"
            if verdict != "killed":
                failures.append([number, verdict])
            shutil.rmtree(folder)
    result = {
        "trials": args.trials,
        "passes": args.trials - len(failures),
        "failures": failures,
        "seed": args.seed,
        "strategy": args.strategy,
        "mode": args.mode,
        "run_s": round(duration_s, 2),
        "seconds": round(time.monotonic() - begin),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
