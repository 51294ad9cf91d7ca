"""``--dry-run``: everything a run would do before its first step, and no step."""

from __future__ import annotations

import math
import sys

import numpy as np
from mmengine.config import Config

from xtuner_lite.config import effective_settings, format_settings
from xtuner_lite.data.dataloader import StepDataLoader
from xtuner_lite.data.preview import render_preview
from xtuner_lite.runner.runner import Runner

_NUM_PREVIEWS = 2


def dry_run(cfg: Config) -> int:
    """Print settings with their origin, the first samples with their mask, and the run's size.

    The config is expected to have passed ``check_config``. The tokenizer and the data are read, the
    model is not; nothing is written.

    Returns:
        0, the exit code.
    """
    print("Effective settings (value, and where it was set):")
    print(format_settings(effective_settings(cfg)))
    runner = Runner.from_cfg(cfg)
    loader = runner.prepare_data()
    dataset, order = loader.dataset, loader.sampler.order(0)
    for number in range(min(_NUM_PREVIEWS, loader.sampler.num_samples)):
        index = int(order[number])
        print(f"\nSample {index}, number {number + 1} in the order of training:")
        print(render_preview(dataset[index], runner.tokenizer, color=sys.stdout.isatty()))
    print("\n" + describe_run_size(cfg, loader))
    print("Dry run: nothing was trained, nothing was written.")
    return 0


def describe_run_size(cfg: Config, loader: StepDataLoader) -> str:
    """Samples, tokens and optimizer steps of a run that trains ``cfg`` on ``loader``."""
    plan, steps = loader.plan, len(loader)
    train_cfg = cfg.get("train_cfg") or {}
    max_iters = train_cfg.get("max_iters") or math.ceil(train_cfg.get("max_epochs", 1) * steps)
    lengths = getattr(loader.dataset, "lengths", None)
    tokens = ""
    if lengths is not None:  # by the order: an epoch of a mixture repeats some samples
        num_tokens = int(np.asarray(lengths)[loader.sampler.order(0)].sum())
        tokens = f", {num_tokens:,} tokens an epoch"
    if getattr(loader, "endless", False):
        return f"a stream; {plan.group_size} samples in an optimizer step, {max_iters:,} steps"
    return (
        f"{plan.sampler.num_samples:,} samples{tokens}\n"
        f"{plan.group_size} samples in an optimizer step (batch_size {plan.batch_size} x "
        "accumulative_counts "
        f"{plan.accumulative_counts} x {plan.world_size} rank(s))\n"
        f"{steps:,} optimizer steps an epoch, {max_iters:,} in the run ({max_iters / steps:.2f} "
        "epochs)"
    )
