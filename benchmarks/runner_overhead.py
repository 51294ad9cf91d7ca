"""What the Runner costs over a bare PyTorch loop, and what a second process gives.

    python benchmarks/runner_overhead.py --out overhead.json

Both loops take the same model, optimizer and batches (SmolLM2-135M, LoRA, packed to 512 tokens, the
shipped config with its default hooks), in one process, in turns of a few steps, so that whatever
else the machine does falls on both. Figures: median seconds per step of each and their ratio.
Then tokens per second of one process with one thread, and of DDP on two processes with one thread
each, through the command line, as users start it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook

from xtuner_lite.config import load_config
from xtuner_lite.runner.loops import move_batch
from xtuner_lite.runner.runner import Runner

CONFIG = "smollm2_135m_sft_lora_custom"
STEPS = 6  # of a turn; the first one of each is left out


class StepTimes(Hook):
    """When each optimizer step ended, all other hooks included."""

    priority = "LOWEST"

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.batches: list[Any] = []

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """One time a step."""
        self.ends.append(time.perf_counter())
        self.batches.append(data_batch)


def config(data: str, work_dir: str, max_length: int) -> Any:
    """The shipped config on the benchmark's data."""
    cfg = load_config(CONFIG)
    cfg.train_dataloader.dataset.update(data=data, max_length=max_length)
    cfg.train_dataloader.update(batch_size=1, num_workers=0)
    cfg.optim_wrapper.update(dtype="fp32", accumulative_counts=1)
    cfg.train_cfg = dict(max_iters=STEPS)
    cfg.default_hooks = {**cfg.get("default_hooks", {}), "checkpoint": None}
    cfg.pop("val_dataloader", None)
    cfg.custom_hooks = []
    cfg.work_dir = work_dir
    cfg.randomness = dict(seed=1)
    cfg.log_level = "WARNING"
    return cfg


def bare_loop(runner: Runner, batches: list[Any]) -> list[float]:
    """The loop that a PyTorch tutorial would write, on the Runner's model; end of each step."""
    model, optimizer = runner.model, runner.optim_wrapper.optimizer
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    model.train()
    ends = []
    for micro_batches in batches:
        num_units = sum(model.count_units(batch) for batch in micro_batches)
        for batch in micro_batches:
            output = model(move_batch(batch, torch.device("cpu")))
            (output.loss_sum / num_units).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ends.append(time.perf_counter())
    return ends


def overhead(data: str, folder: str, turns: int, max_length: int) -> dict[str, Any]:
    """Median step times of both loops, taken in turns."""
    ours: list[float] = []
    bare: list[float] = []
    for turn in range(turns):
        times = StepTimes()
        runner = Runner.from_cfg(config(data, f"{folder}/{turn}", max_length))
        runner.register_hook(times)
        runner.train()
        ours += [b - a for a, b in zip(times.ends[:-1], times.ends[1:])]
        ends = bare_loop(runner, times.batches)
        bare += [b - a for a, b in zip(ends[:-1], ends[1:])]
    ours_s, bare_s = statistics.median(ours), statistics.median(bare)
    # Step i of a turn is the same batch in both: pairs differ by the loops and by noise only.
    paired = statistics.median(a / b for a, b in zip(ours, bare, strict=True))
    return {
        "runner_step_s": round(ours_s, 4), "bare_step_s": round(bare_s, 4),
        "ratio_of_medians": round(ours_s / bare_s, 4), "median_of_ratios": round(paired, 4),
        "steps": len(ours), "threads": torch.get_num_threads(),
    }  # fmt: skip


def tokens_per_s(data: str, folder: str, nproc: int, threads: int, max_length: int) -> float:
    """Through the command line; the first step is left out."""
    options = [
        f"train_dataloader.dataset.data={data}",
        f"train_dataloader.dataset.max_length={max_length}",
        "train_dataloader.batch_size=1",
        "train_dataloader.num_workers=0",
        "optim_wrapper.dtype=fp32",
        f"optim_wrapper.accumulative_counts={2 // nproc}",
        "train_cfg.max_epochs=None",
        "train_cfg.max_iters=5",
        "default_hooks.logger.jsonl_interval=1",
    ]
    command = [sys.executable, "-m", "xtuner_lite.cli.main", "train", CONFIG, "--work-dir", folder]
    command += ["--seed", "1", *(["--nproc", str(nproc)] if nproc > 1 else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([*command, "--cfg-options", *options], check=True, env=environment)
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return statistics.median(r["tokens_per_s"] for r in records if r["step"] > 1)


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="rows in a format of check-data; default: written here")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or write_rows(Path(folder) / "rows.jsonl")
        result = overhead(data, folder, args.turns, args.max_length)
        print(json.dumps(result), flush=True)
        for name, nproc, threads in (("1x1", 1, 1), ("1x2", 1, 2), ("ddp_2x1", 2, 1)):
            result[f"tokens_per_s_{name}"] = round(
                tokens_per_s(data, f"{folder}/{name}", nproc, threads, args.max_length), 1
            )
    result["ddp_scaling"] = round(
        result["tokens_per_s_ddp_2x1"] / (2 * result["tokens_per_s_1x1"]), 3
    )
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n")


def write_rows(path: Path) -> str:
    """400 short conversations about numbers; their content does not matter for the time."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(400):
            answer = " ".join(f"{number} and {k} make {number + k}." for k in range(1, 14))
            messages = [
                {"role": "user", "content": f"Add to {number}."},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return str(path)


if __name__ == "__main__":
    main()
