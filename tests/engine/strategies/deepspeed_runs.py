"""What the tests of strategy DeepSpeed run: several trainings in one pair of processes.

Importing DeepSpeed takes a rank seconds, so that a test asks one pair for all of its trainings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from peft import LoraConfig

from tests.engine.strategies.same_run import Figures, StopAfter, rows, run_config
from tests.ranks import run_ranks
from tests.tiny import tiny_llama, tiny_tokenizer
from xtuner_lite.data.dataset import ChatDataset
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.models.loading import load_causal_lm
from xtuner_lite.runner.runner import Runner


def zero(config: str | dict[str, Any], **options: Any) -> dict[str, Any]:
    """Strategy section."""
    return dict(type="DeepSpeed", config=config, **options)


class SkipStep(Hook):
    """Drops one step's update; notes whether this rank's training state stayed as it was."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.is_unchanged = False
        self._before: dict[tuple[str, int, str], torch.Tensor] = {}

    def before_optimizer_step(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.step:
            self._before = state_of(runner.strategy)
            runner.train_loop.skip_step()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.step:
            after = state_of(runner.strategy)
            self.is_unchanged = after.keys() == self._before.keys() and all(
                torch.equal(value, self._before[key]) for key, value in after.items()
            )


class Poison(Hook):
    """Makes the loss of the last rank NaN at one step."""

    priority = "HIGHEST"

    def __init__(self, step: int) -> None:
        self.step = step

    def before_run(self, runner):
        strategy, backward = runner.strategy, runner.strategy.backward

        def poisoned(loss_sum, num_units, *, is_last=True):
            if runner.iter + 1 == self.step and strategy.rank == strategy.world_size - 1:
                loss_sum = loss_sum * float("nan")
            backward(loss_sum, num_units, is_last=is_last)

        strategy.backward = poisoned


def state_of(strategy: Any) -> dict[tuple[str, int, str], torch.Tensor]:
    """Copies of this rank's weights and optimizer state: (name, first element, key) -> elements."""
    state = {}
    for piece in strategy.pieces():
        for key, value in {**piece.tensors, **piece.scalars}.items():
            state[piece.name, piece.start, key] = torch.as_tensor(value).detach().clone()
    return state


def train(
    work_dir: Path,
    strategy: dict[str, Any] | None,
    *,
    world_size: int = 1,
    lora: bool = False,
    llm: dict[str, Any] | None = None,
    dropout: float = 0.0,
    model: dict[str, Any] | None = None,
    four_bit_path: Path | None = None,
    dtype: str = "fp32",
    val: bool = False,
    skip: int | None = None,
    poison: int | None = None,
    stop_after: int | None = None,
    optim: dict[str, Any] | None = None,
    hooks: list[dict[str, Any]] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Train on this rank as ``same_run.train`` does, with what these tests vary.

    Args:
        llm: options of tiny_llama.
        four_bit_path: load the base from this folder in 4 bits instead.
        dropout: of the adapter, or of attention.
        model: options of SupervisedFinetune.
        skip: step whose update a hook drops.
        poison: step at which the last rank's loss is NaN.
        optim: changes to optim_wrapper.
    """
    config = run_config(Path(work_dir), strategy, world_size=world_size, lora=lora, **changes)
    adapter = None
    if lora:
        adapter = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=dropout)
    torch.manual_seed(11)
    options = {"attention_dropout": 0.0 if lora else dropout, **(llm or {})}
    base = load_causal_lm(four_bit_path, quantization="4bit") if four_bit_path else None
    config["model"] = SupervisedFinetune(
        base or tiny_llama(**options), lora=adapter, **{"self_check": False, **(model or {})}
    )
    config["optim_wrapper"].update({"dtype": dtype, **(optim or {})})
    if val:
        config["val_dataloader"] = dict(
            dataset=ChatDataset(rows(5), tokenizer=tiny_tokenizer(), max_length=64), batch_size=1
        )
        config["val_cfg"] = {}
        config["train_cfg"]["val_interval"] = 3
    figures, skipper = Figures(), SkipStep(skip or -1)
    extra = [Poison(poison)] if poison else []
    extra += [StopAfter(stop_after)] if stop_after else []
    config["custom_hooks"] = [*(hooks or []), figures, skipper, *extra]
    if poison:
        config["default_hooks"]["nan_guard"] = dict(policy="skip")
    runner = Runner(**config)
    runner.tokenizer = tiny_tokenizer()
    runner.train()
    result = {
        "losses": figures.losses, "grad_norms": figures.grad_norms, "rates": figures.rates,
        "is_unchanged": skipper.is_unchanged,
    }  # fmt: skip
    if val:
        result["val"] = runner.val_loop.metrics[0].compute(runner.strategy.sum_over_ranks)
    return result


def evaluate(work_dir: Path, strategy: dict[str, Any] | None, *, world_size: int = 1) -> dict:
    """Evaluate an untrained model, without a training before it."""
    config = run_config(Path(work_dir), strategy, world_size=world_size)
    config["val_dataloader"] = config.pop("train_dataloader")
    runner = Runner(**config)
    runner.tokenizer = tiny_tokenizer()
    results = runner.val()
    names = list(runner.model.state_dict())
    weights = runner.strategy.full_weights(names)
    return {"val": results, "sum": float(sum(w.double().sum() for w in weights.values()))}


def train_on_ranks(jobs: list[tuple[Path, dict | None, dict]], world_size: int = 2) -> list[dict]:
    """Run trainings (work_dir, strategy, options of train) one after the other on two ranks.

    Returns:
        The main rank's results; the other ranks' figures were the same.
    """
    results = run_ranks(_train_all, jobs, world_size, world_size=world_size, timeout_s=600)
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            assert str(mine) == str(theirs)  # as text: NaN equals NaN
    return results[0]


def _train_all(jobs: list[tuple[Path, dict | None, dict]], world_size: int) -> list[dict]:
    return [
        train(work_dir, strategy, world_size=world_size, **options)
        for work_dir, strategy, options in jobs
    ]
