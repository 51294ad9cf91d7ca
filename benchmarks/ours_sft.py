"""xtuner_lite's side of sft_throughput.py: a shipped config and the Runner, nothing private."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from peers.memory import peak_rss_mib

from xtuner_lite.config import check_config, load_config, report_problems
from xtuner_lite.runner.runner import Runner


class StepTimes(Hook):
    """Notes when each optimizer step ended and how many tokens it saw."""

    priority = "LOWEST"

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """One record a step."""
        self.steps.append(
            dict(
                end_s=time.perf_counter(),
                tokens=int(outputs["num_tokens"]),
                supervised=int(outputs["num_units"]),
                loss=outputs["loss"],
            )
        )


def main() -> None:
    """Trains, then writes the steps and the peak memory to ``--out``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--max-length", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--work-dir", required=True)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cfg = load_config("smollm2_135m_sft_lora_alpaca")
    cfg.tokenizer.path = cfg.model.llm.path = args.model
    cfg.train_dataloader.batch_size = 1
    cfg.train_dataloader.dataset.update(data=args.data, max_length=args.max_length)
    cfg.optim_wrapper.update(dtype=args.dtype, accumulative_counts=1)
    cfg.train_cfg = dict(max_iters=args.steps)
    cfg.default_hooks.update(checkpoint=None, loss_curve=None)  # TRL's side saves nothing either
    cfg.work_dir = args.work_dir
    if problems := check_config(cfg):
        sys.exit(report_problems(problems))
    times = StepTimes()
    runner = Runner.from_cfg(cfg)
    runner.register_hook(times)
    model = runner.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    result = {
        "steps": times.steps,
        "samples": len(runner.train_dataloader.dataset),
        "peak_rss_mib": peak_rss_mib(),
        "trainable": sum(p.numel() for p in trained),
        "dtypes": {
            "trained": str(trained[0].dtype),
            "frozen": str(next(p.dtype for p in model.parameters() if not p.requires_grad)),
        },
        "optimizer": type(runner.optim_wrapper.optimizer).__name__,
    }
    Path(args.out).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
