"""A short training of the toy with the hooks under test, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.hooks import Hook

from tests.toy import ToyData, toy_collate, toy_config
from xtuner_lite.engine.hooks import DEFAULT_HOOKS
from xtuner_lite.runner.runner import Runner

NO_DEFAULTS = dict.fromkeys(DEFAULT_HOOKS)


class Outputs(Hook):
    """Keeps the outputs of each step."""

    priority = "LOWEST"

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.steps.append(dict(outputs))


def toy_loader(**data: Any) -> dict[str, Any]:
    """A dataloader section over ToyData, 2 samples a micro-batch."""
    return dict(dataset=dict(type=ToyData, **data), batch_size=2, collate_fn=dict(type=toy_collate))


def train(work_dir: Path, hooks: dict[str, Any], **changes: Any) -> tuple[Runner, Outputs]:
    """Trains the toy (3 steps an epoch, 2 epochs) with ``hooks`` as its only default hooks."""
    outputs = Outputs()
    custom = [outputs, *changes.pop("custom_hooks", [])]
    config = toy_config(work_dir, default_hooks={**NO_DEFAULTS, **hooks}, log_level="INFO")
    runner = Runner(**{**config, "custom_hooks": custom, **changes})
    runner.train()
    return runner, outputs


def log_text(runner: Runner) -> str:
    """The run's log file."""
    return (runner.log_dir / "run.log").read_text(encoding="utf-8")
