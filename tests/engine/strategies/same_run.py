"""One small training that every strategy runs, and what comes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from peft import LoraConfig
from safetensors.torch import load_file

from tests.tiny import tiny_llama, tiny_tokenizer
from xtuner_lite.data.dataset import ChatDataset
from xtuner_lite.engine.checkpoint import list_checkpoints, verify_checkpoint
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.runner.runner import Runner

#: Samples of one optimizer step, whatever the number of ranks.
GROUP = 4


class Figures(Hook):
    """Loss, gradient norm and learning rate of every step."""

    priority = "HIGHEST"

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.rates: list[float] = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.rates.append(runner.optim_wrapper.get_lr()["lr"][0])

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(outputs["loss"])
        self.grad_norms.append(outputs["grad_norm"])


class StopAfter(Hook):
    """Ends the run after ``step`` optimizer steps, as if it had been interrupted there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        runner.train_loop.stop_training |= runner.iter + 1 == self.step


def rows(num: int = 22) -> list[dict]:
    """Conversations of very different lengths: micro-batches have uneven numbers of tokens."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"Say {i}."},
                {"role": "assistant", "content": f"{i} " * (1 + (i * 5) % 11)},
            ]
        }
        for i in range(num)
    ]


def run_config(
    work_dir: Path,
    strategy: dict[str, Any] | None,
    *,
    world_size: int = 1,
    batch_size: int = 1,
    lora: bool = False,
    model: dict[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Sections of a Runner; 22 samples, 4 a step, so that the last step of an epoch is short."""
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear") if lora else None
    torch.manual_seed(11)
    options = {"self_check": False, **(model or {})}
    config = dict(
        model=SupervisedFinetune(tiny_llama(), lora=adapter, **options),
        work_dir=str(work_dir),
        strategy=strategy,
        launcher="pytorch" if world_size > 1 else "none",
        train_dataloader=dict(
            dataset=ChatDataset(rows(), tokenizer=tiny_tokenizer(), max_length=64),
            batch_size=batch_size,
        ),
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=1e-2, weight_decay=0.1),
            dtype="fp32",
            accumulative_counts=GROUP // (batch_size * world_size),
            clip_grad=dict(max_norm=1.0),
            paramwise_cfg=dict(norm_decay_mult=0.0),
        ),
        param_scheduler=dict(type="WarmupCosineLR"),
        train_cfg=dict(max_iters=7),
        randomness=dict(seed=3),
        default_hooks=dict(
            dataset_preview=None, loss_curve=None,
            checkpoint=dict(interval=3, max_keep_ckpts=3),
        ),
        log_level="ERROR",
    )  # fmt: skip
    if lora:
        config["optim_wrapper"].pop("paramwise_cfg")
    return {**config, **changes}


def train(
    work_dir: Path,
    strategy: dict[str, Any] | None,
    *,
    stop_after: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train (on this rank) 7 steps, or until ``stop_after``; returns the Figures of the steps."""
    config = run_config(work_dir, strategy, **options)
    figures = Figures()
    config["custom_hooks"] = [*config.get("custom_hooks", ()), figures]
    if stop_after is not None:
        config["custom_hooks"].append(StopAfter(stop_after))
    runner = Runner(**config)
    runner.tokenizer = tiny_tokenizer()
    runner.train()
    return {"losses": figures.losses, "grad_norms": figures.grad_norms, "rates": figures.rates}


def saved_weights(work_dir: Path) -> dict[str, torch.Tensor]:
    """The weights in Hugging Face form of the newest checkpoint, which must be whole."""
    newest = list_checkpoints(work_dir)[-1]
    verify_checkpoint(newest)
    weights: dict[str, torch.Tensor] = {}
    for path in newest.glob("*.safetensors"):
        weights.update(load_file(path))
    return weights


def assert_same(one: dict[str, Any], other: dict[str, Any], rtol: float = 1e-6) -> None:
    """Losses, gradient norms and learning rates agree within ``rtol``."""
    assert one["rates"] == other["rates"]
    for key in ("losses", "grad_norms"):
        torch.testing.assert_close(
            torch.tensor(one[key], dtype=torch.float64),
            torch.tensor(other[key], dtype=torch.float64),
            rtol=rtol, atol=0.0, msg=lambda text, key=key: f"{key}: {text}",
        )  # fmt: skip


def assert_same_weights(one: Path, other: Path, rtol: float = 1e-6) -> None:
    """The saved weights of two runs agree: norm of the difference over norm, tensor by tensor.

    By norm, because AdamW turns the rounding of a gradient that is nearly zero into a whole step.
    """
    first, second = saved_weights(one), saved_weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        distance = (tensor.double() - second[name].double()).norm() / tensor.double().norm()
        assert distance <= rtol, f"{name}: relative distance {distance:.2e}"
