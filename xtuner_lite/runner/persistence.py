"""What a run stores besides its weights, and how it takes all of it back."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from xtuner_lite.data.fingerprint import dataset_fingerprint
from xtuner_lite.data.ledger import Ledger
from xtuner_lite.engine.checkpoint import TRAINER_DIR, CheckpointError
from xtuner_lite.engine.distributed import load_random_state, random_state
from xtuner_lite.engine.state_io import load_state, save_state
from xtuner_lite.version import __version__

if TYPE_CHECKING:
    from xtuner_lite.runner.runner import Runner

# What must be equal for a resume to be exact, with what to do where it is not.
_MUST_MATCH = {
    "group_size": "samples per optimizer step (batch_size x accumulative_counts x ranks)",
    "num_samples": "samples in the training data",
    "data_fingerprint": "the training data itself",
    "data_order": "the order of the samples (sampler, seed)",
    "method": "the training method",
    "frozen_weights": "the model under the trained weights (model.llm.path)",
    "compute_dtype": "compute dtype (optim_wrapper.dtype)",
}


def write_run(runner: Runner, folder: Path) -> None:
    """Put everything of the run into the empty checkpoint ``folder``."""
    checkpoint: dict[str, Any] = {
        "state_dict": runner.model.state_dict(),
        "meta": describe_run(runner),
    }
    runner.call_hook("before_save_checkpoint", checkpoint=checkpoint)
    meta, weights = checkpoint.pop("meta"), checkpoint.pop("state_dict")
    runner.model.save_pretrained(folder, weights)
    if runner.tokenizer is not None:
        runner.tokenizer.save_pretrained(folder)
    trainer = folder / TRAINER_DIR
    trainer.mkdir()
    save_state(meta, trainer, "meta")
    save_state(exact_weights(runner.model, weights), trainer, "weights")
    save_state(runner.strategy.state_dict(), trainer, "optimizer")
    ledger = getattr(runner.train_dataloader.dataset, "ledger", None)
    if isinstance(ledger, Ledger):
        save_state(ledger.to_dict(), trainer, "ledger")
    save_state(
        {
            "random": random_state(),
            "param_schedulers": [scheduler.state_dict() for scheduler in runner.param_schedulers],
            "hooks": {name: hook.state_dict() for name, hook in _stateful_hooks(runner)},
            "entries": checkpoint,  # what hooks added, e.g. EMA weights
        },
        trainer,
        "state",
    )
    if runner.cfg is not None:
        from xtuner_lite.config import dump_config

        dump_config(runner.cfg, folder / "config.py")


def describe_run(runner: Runner) -> dict[str, Any]:
    """Where the run stands and what it runs on, in plain values."""
    loop, plan = runner.train_loop, runner.train_dataloader.plan
    return {
        "version": __version__,
        "torch": torch.__version__,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "iter": loop.num_completed_steps,
        "epoch": loop.num_completed_steps // len(runner.train_dataloader),
        "num_consumed_samples": _consumed_samples(plan, loop.num_completed_steps),
        "max_iters": loop.max_iters,
        "seed": runner.seed,
        "num_threads": torch.get_num_threads(),
        "device": runner.strategy.device.type,
        "compute_dtype": str(runner.strategy.precision.dtype).removeprefix("torch."),
        "group_size": plan.group_size,
        "num_samples": plan.sampler.num_samples,
        "data_fingerprint": dataset_fingerprint(runner.train_dataloader.dataset),
        "data_order": runner.train_dataloader.order_digest,
        "method": type(runner.model).__name__,
        "frozen_weights": frozen_digest(runner.model),
    }


def read_meta(path: Path) -> dict[str, Any]:
    """The description that ``write_run`` stored.

    Raises:
        CheckpointError: the folder holds weights only.
    """
    trainer = Path(path) / TRAINER_DIR
    if not (trainer / "meta.json").is_file():
        raise CheckpointError(
            f"{path} holds no training state ({TRAINER_DIR}/meta.json is missing), so it cannot "
            "be resumed. "
            "To start a new run from its weights, use load_from (--load-from)."
        )
    return load_state(trainer, "meta")


def resume_run(runner: Runner, path: Path) -> None:
    """Put weights, optimizer, schedulers, generators, hooks and position back to those of ``path``.

    Raises:
        CheckpointError: the run differs from the saved one where that would make the resume
            inexact.
    """
    trainer = path / TRAINER_DIR
    meta = load_state(trainer, "meta")
    _check_same_run(describe_run(runner), meta, path)
    state = load_state(trainer, "state")
    weights = {**runner.model.state_dict(), **load_state(trainer, "weights")}
    checkpoint = {"state_dict": weights, "meta": meta, **state["entries"]}
    runner.call_hook("after_load_checkpoint", checkpoint=checkpoint)
    load_exact_weights(runner.model, checkpoint["state_dict"], path)
    runner.strategy.load_state_dict(load_state(trainer, "optimizer"))
    if len(runner.param_schedulers) != len(state["param_schedulers"]):
        raise CheckpointError(
            f"{path} has {len(state['param_schedulers'])} learning-rate schedules, this run "
            f"{len(runner.param_schedulers)}. Put param_scheduler back as it was, or start a new "
            "run from the weights with --load-from."
        )
    for scheduler, saved in zip(runner.param_schedulers, state["param_schedulers"], strict=True):
        scheduler.load_state_dict(saved)
    hooks = dict(_stateful_hooks(runner))
    for name, saved in state["hooks"].items():
        if name in hooks:
            hooks[name].load_state_dict(saved)
        else:
            runner.logger.warning(
                f"the checkpoint holds state of hook {name}, which this run does not have"
            )
    runner.train_loop.start_from(meta["iter"])
    load_random_state(state["random"])


def frozen_digest(model: nn.Module) -> str:
    """Digest of the parameters that do not train: names, shapes and some values of each.

    The checkpoint does not hold them, so a resume must find the same ones. A few values of every
    tensor tell two models apart; reading all of them would take as long as loading the model.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            flat = parameter.detach().reshape(-1)
            values = torch.cat([flat[:16], flat[-16:]]).cpu().contiguous()
            digest.update(f"{name} {tuple(parameter.shape)}".encode())
            digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def exact_weights(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The trainable parameters (float32) and persistent buffers out of ``state_dict``."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    names |= {name for name, _ in model.named_buffers()}
    return {name: value for name, value in state_dict.items() if name in names}


@torch.no_grad()
def load_exact_weights(model: nn.Module, state_dict: dict[str, Tensor], path: Path) -> None:
    """Copy weights into the model's trainable parameters and buffers, name by name.

    Raises:
        CheckpointError: a name is missing or has another shape.
    """
    own = model.state_dict()
    targets = exact_weights(model, own)
    for name, target in targets.items():
        value = state_dict.get(name)
        if value is None or value.shape != target.shape:
            got = "is missing" if value is None else f"has shape {tuple(value.shape)}"
            raise CheckpointError(
                f"{path}: weight {name} {got}, the model needs {tuple(target.shape)}. Resume "
                "with the model and adapter "
                "settings of the saved run."
            )
        target.copy_(value)


def _check_same_run(now: dict[str, Any], saved: dict[str, Any], path: Path) -> None:
    different = [
        f"{what}: saved {saved.get(key)!r}, now {now[key]!r}"
        for key, what in _MUST_MATCH.items()
        if saved.get(key) != now[key]
    ]
    if different:
        raise CheckpointError(
            f"{path} cannot be resumed exactly; what differs: "
            + "; ".join(different)
            + ". Put these settings "
            "back, or start a new run from its weights with --load-from."
        )


def _consumed_samples(plan: Any, num_steps: int) -> int:
    epochs, steps = divmod(num_steps, plan.steps_per_epoch)
    per_epoch = plan.sampler.num_samples
    if plan.drop_last:
        per_epoch -= per_epoch % plan.group_size
    return epochs * per_epoch + steps * plan.group_size


def _stateful_hooks(runner: Runner) -> list[tuple[str, Any]]:
    named, seen = [], {}
    for hook in runner.hooks:
        if callable(getattr(hook, "state_dict", None)) and callable(
            getattr(hook, "load_state_dict", None)
        ):
            name = type(hook).__name__
            seen[name] = seen.get(name, 0) + 1
            named.append((name if seen[name] == 1 else f"{name}#{seen[name]}", hook))
    return named
