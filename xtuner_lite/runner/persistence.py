"""What a run stores besides its weights, and how it takes all of it back."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from xtuner_lite.data.fingerprint import dataset_fingerprint
from xtuner_lite.data.ledger import Ledger
from xtuner_lite.engine.checkpoint import TRAINER_DIR, CheckpointError
from xtuner_lite.engine.distributed import (
    Ranks,
    load_random_state,
    random_state,
    seed_of_rank,
    set_randomness,
)
from xtuner_lite.engine.pieces import PieceReader, copy_to_cpu, trainable_names, write_pieces
from xtuner_lite.engine.state_io import load_state, save_state
from xtuner_lite.engine.strategies.fsdp2_sharding import original_class
from xtuner_lite.images.vision_inputs import save_tokenizer, vision_of
from xtuner_lite.models.packed_forward import unwrap_adapter
from xtuner_lite.version import __version__

if TYPE_CHECKING:
    from xtuner_lite.data.dataloader import StepDataLoader
    from xtuner_lite.models.streamed_save import SavePlan
    from xtuner_lite.runner.runner import Runner

# What must be equal for a resume to be exact, with what to do where it is not.
_MUST_MATCH = {
    "group_size": "samples per optimizer step (batch_size x accumulative_counts x ranks)",
    "num_samples": "samples in the training data",
    "data_fingerprint": "the training data itself",
    "data_order": "the order of the samples (sampler, seed)",
    "method": "the training method",
    "frozen_weights": "the model under the trained weights (model.llm.path)",
    "features": "how images are seen (the processor's settings, visual_select_layer)",
    "compute_dtype": "compute dtype (optim_wrapper.dtype)",
}


class RunSnapshot:
    """A run as it stood after a step, in CPU memory, ready to be written by ``write``.

    Made on every rank together (it gathers weights). Writing needs no word between ranks, except
    where a whole model lies in parts on them: it is gathered tensor by tensor while it is written,
    so that no rank holds it.

    Args:
        runner: the run, between two steps.
        clone: keep copies, so that training may go on while it is written. The main rank then holds
            all that is written.
    """

    def __init__(self, runner: Runner, *, clone: bool = False) -> None:
        strategy, model = runner.strategy, runner.model
        names = _saved_names(model)
        self.plan = None if clone else _plan_streamed_save(runner)
        if self.plan is None:
            weights = dict(strategy.full_weights(names))
        else:
            weights = model.state_dict()  # for hooks to look at: this rank's parts
        own = dict(weights)
        checkpoint: dict[str, Any] = {"state_dict": weights, "meta": describe_run(runner)}
        runner.call_hook("before_save_checkpoint", checkpoint=checkpoint)
        self.meta, weights = checkpoint.pop("meta"), checkpoint.pop("state_dict")
        replaced = {k: v for k, v in weights.items() if v is not own.get(k)}  # by a hook
        if replaced and strategy.is_sharded:
            raise CheckpointError(
                f"a hook changed the weights to save ({', '.join(sorted(replaced)[:3])}, ...), "
                "which works where each rank holds the whole model only (SingleDevice, DDP)"
            )
        self.runner, self.rank, self.is_main = runner, strategy.rank, strategy.is_main
        self.pieces = copy_to_cpu(strategy.pieces(), clone=clone)
        self.random = random_state()
        if not self.is_main:
            return
        if self.plan is None:
            self.weights = {k: _on_cpu(v, clone) for k, v in weights.items()}
        buffers = {name for name, _ in model.named_buffers()}
        self.buffers = {k: _on_cpu(v, clone) for k, v in weights.items() if k in buffers}
        self.replaced = {k: _on_cpu(v, clone) for k, v in replaced.items()}
        ledger = getattr(runner.train_dataloader.dataset, "ledger", None)
        self.ledger = ledger.to_dict() if isinstance(ledger, Ledger) else None
        self.state = copy.deepcopy(
            {
                "optimizer": strategy.state_dict(),
                "param_schedulers": [s.state_dict() for s in runner.param_schedulers],
                "hooks": {name: hook.state_dict() for name, hook in _stateful_hooks(runner)},
                "entries": checkpoint,  # what hooks added, e.g. EMA weights
            }
        )

    def write(self, folder: Path) -> None:
        """Put this rank's files into the checkpoint ``folder``; the main rank writes the rest."""
        runner = self.runner
        if self.plan is not None:
            # First of all: every rank takes part, and none may have failed before.
            runner.model.save_streamed(
                folder if self.is_main else None, self.plan, runner.strategy.stream_weights
            )
        trainer = folder / TRAINER_DIR
        trainer.mkdir(exist_ok=True)
        write_pieces(trainer, self.rank, self.pieces)
        save_state(self.random, trainer, f"random_{self.rank:05d}")
        if not self.is_main:
            return
        if self.plan is None:
            runner.model.save_pretrained(folder, self.weights)
        if runner.tokenizer is not None:
            save_tokenizer(runner.tokenizer, folder)
        save_state(self.meta, trainer, "meta")
        save_state(self.buffers, trainer, "buffers")
        save_state(self.replaced, trainer, "replaced_weights")
        save_state(self.state, trainer, "state")
        if self.ledger is not None:
            save_state(self.ledger, trainer, "ledger")
        if runner.cfg is not None:
            from xtuner_lite.config import dump_config

            dump_config(runner.cfg, folder / "config.py")


def _plan_streamed_save(runner: Runner) -> SavePlan | None:
    """The same plan on every rank; None where the weights are not in parts, or must be held."""
    plan_save = getattr(runner.model, "plan_streamed_save", None)
    if not runner.strategy.is_sharded or plan_save is None:
        return None
    return runner.strategy.ranks.on_main(plan_save)


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
        "strategy": type(runner.strategy).__name__,
        "world_size": runner.strategy.world_size,
        "group_size": plan.group_size,
        "num_samples": plan.sampler.num_samples,
        "data_fingerprint": dataset_fingerprint(runner.train_dataloader.dataset),
        "data_order": runner.train_dataloader.order_digest,
        "method": original_class(runner.model).__name__,
        "frozen_weights": runner.frozen_weights,
        "features": _features(runner),
    }


def _features(runner: Runner) -> str | None:
    """What decides the pixels and which features of them are taken; None for a run of text.

    The data's fingerprint tells tokens and names of images only.
    """
    vision = vision_of(runner.tokenizer)
    if vision is None:
        return None
    settings = json.dumps(vision.settings(), sort_keys=True)
    config = getattr(unwrap_adapter(getattr(runner.model, "llm", None)), "config", None)
    layer, strategy = (
        getattr(config, f"vision_feature_{name}", None) for name in ("layer", "select_strategy")
    )
    return f"layer {layer}, {strategy}, {hashlib.sha256(settings.encode()).hexdigest()[:12]}"


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
    meta = load_state(path / TRAINER_DIR, "meta")
    _check_same_run(describe_run(runner), meta, path)
    load_run_state(runner, path)
    runner.train_loop.start_from(meta["iter"])
    strategy = runner.strategy
    if (meta["strategy"], meta["world_size"]) != (type(strategy).__name__, strategy.world_size):
        runner.logger.warning(
            f"the checkpoint is of {meta['strategy']} on {meta['world_size']} process(es), this "
            f"run is {type(strategy).__name__} on {strategy.world_size}: the same samples follow, "
            "losses agree to rounding, dropout masks are others"
        )


def load_run_state(runner: Runner, path: Path, *, keep_progress: bool = False) -> None:
    """Weights, optimizer, schedulers, generators and hooks of ``path``; not the position.

    Args:
        keep_progress: schedules and hook states, which count the run, stay as they are.
    """
    trainer, strategy = path / TRAINER_DIR, runner.strategy
    state = load_state(trainer, "state")
    if len(runner.param_schedulers) != len(state["param_schedulers"]):
        raise CheckpointError(
            f"{path} has {len(state['param_schedulers'])} learning-rate schedules, this run "
            f"{len(runner.param_schedulers)}. Put param_scheduler back as it was, or start a new "
            "run from the weights with --load-from."
        )
    strategy.load_state_dict(state["optimizer"])
    strategy.load_pieces(PieceReader(trainer))
    _load_buffers(runner.model, load_state(trainer, "buffers"), path)
    meta = load_state(trainer, "meta")
    checkpoint = {"meta": meta, **state["entries"], "state_dict": runner.model.state_dict()}
    replaced = load_state(trainer, "replaced_weights")
    checkpoint["state_dict"] = {**checkpoint["state_dict"], **replaced}
    runner.call_hook("after_load_checkpoint", checkpoint=checkpoint)
    if replaced:
        _load_replaced(runner.model, checkpoint["state_dict"], replaced)
    if not keep_progress:
        _load_progress(runner, state)
    stem = f"random_{strategy.rank:05d}"
    if meta["world_size"] == strategy.world_size:
        load_random_state(load_state(trainer, stem))
    else:
        set_randomness(seed_of_rank(runner.seed + meta["iter"], strategy.rank))


def _load_progress(runner: Runner, state: dict[str, Any]) -> None:
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


def check_equal_data(name: str, loader: StepDataLoader, ranks: Ranks) -> None:
    """Raises ValueError where ranks read different data: each would count other samples."""
    seen = ranks.gather((len(loader), dataset_fingerprint(loader.dataset)))
    others = [rank for rank, what in enumerate(seen) if what != seen[0]]
    if others:
        raise ValueError(
            f"{name}: ranks {others} read other data than rank 0 ({seen[0][0]} steps an epoch on "
            f"rank 0, {seen[others[0]][0]} on rank {others[0]}). Give every machine the same "
            "files, or put them on storage that all machines share."
        )


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


def _saved_names(model: nn.Module) -> list[str]:
    """Names of the tensors that ``model.save_pretrained`` writes, and of the buffers."""
    if (own := getattr(model, "saved_names", None)) is not None:
        return own()
    has_adapter = getattr(model, "has_adapter", False)
    return sorted(trainable_names(model)) if has_adapter else list(model.state_dict())


def _on_cpu(tensor: Tensor, clone: bool) -> Tensor:
    return tensor.detach().to("cpu", copy=clone)


@torch.no_grad()
def _load_buffers(model: nn.Module, saved: dict[str, Tensor], path: Path) -> None:
    for name, buffer in model.named_buffers():
        if name in saved:
            if saved[name].shape != buffer.shape:
                raise CheckpointError(
                    f"{path}: buffer {name} has shape {tuple(saved[name].shape)}, the model needs "
                    f"{tuple(buffer.shape)}. Resume with the model of the saved run."
                )
            buffer.copy_(saved[name])


@torch.no_grad()
def _load_replaced(model: nn.Module, weights: dict[str, Tensor], names: Iterable[str]) -> None:
    """Take what a hook gives back for the weights that it had replaced in the checkpoint."""
    own = model.state_dict()
    for name in names:
        own[name].copy_(weights[name])


def _check_same_run(now: dict[str, Any], saved: dict[str, Any], path: Path) -> None:
    different = [
        f"{what}: saved {saved.get(key)!r}, now {now[key]!r}"
        for key, what in _MUST_MATCH.items()
        if saved.get(key) != now[key]
    ]
    if different:
        hint = ""
        if now["world_size"] != saved["world_size"]:
            hint = (
                f" The checkpoint was written by {saved['world_size']} process(es), this run has "
                f"{now['world_size']}: change optim_wrapper.accumulative_counts so that "
                f"batch_size x accumulative_counts x processes is {saved['group_size']} again."
            )
        raise CheckpointError(
            f"{path} cannot be resumed exactly; what differs: {'; '.join(different)}.{hint} Put "
            "these settings back, or start a new run from its weights with --load-from."
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
