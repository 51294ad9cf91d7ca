"""Whether a DeepSpeed JSON agrees with the run's config, which is the truth."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from xtuner_lite.engine.strategies.deepspeed_config import AUTO
from xtuner_lite.structures import DTYPE_NAMES

Facts = dict[str, tuple[Any, str]]


def run_facts(
    optim_wrapper: Any, *, batch_size: int | None, world_size: int, dtype: str | None
) -> Facts:
    """What the run's config says: path in the JSON ('bf16.enabled') -> (value, place).

    Args:
        optim_wrapper: an OptimWrapper, the config of one, or None.
        batch_size: samples of a micro-batch; None: not known here.
        world_size: processes.
        dtype: compute dtype ('bf16') where the device has decided; None takes the config's word.

    Raises:
        ValueError: clipping by another norm than DeepSpeed's.
    """
    read = _reader(optim_wrapper)
    accumulation, clip = read("accumulative_counts", 1), read("clip_grad", None) or {}
    if clip.get("norm_type", 2.0) != 2.0:
        raise ValueError(
            f"optim_wrapper.clip_grad.norm_type is {clip['norm_type']}; DeepSpeed clips by the "
            "2-norm only. Leave it out, or use another strategy."
        )
    facts: Facts = {
        "gradient_accumulation_steps": (accumulation, "optim_wrapper.accumulative_counts"),
        "gradient_clipping": (
            float(clip.get("max_norm", 0.0)), "optim_wrapper.clip_grad.max_norm (0: none)"
        ),
    }  # fmt: skip
    if batch_size is not None:
        place = "train_dataloader.batch_size"
        facts["train_micro_batch_size_per_gpu"] = (batch_size, place)
        facts["train_batch_size"] = (
            batch_size * accumulation * world_size, f"{place} x accumulative_counts x processes"
        )  # fmt: skip
    told = str(read("dtype", AUTO))
    if dtype is None and told != AUTO:
        dtype = {long: short for short, long in DTYPE_NAMES.items()}.get(told, told)
    if dtype is not None:
        name = dtype if told == dtype else f"{told}, here {dtype}"
        for kind in ("bf16", "fp16"):
            facts[f"{kind}.enabled"] = (dtype == kind, f"{kind} by optim_wrapper.dtype ({name})")
    if dtype == "fp16":
        scale = read("loss_scale", "dynamic")
        value = 0 if scale == "dynamic" else float(scale)
        facts["fp16.loss_scale"] = (value, "optim_wrapper.loss_scale (0: dynamic)")
    return facts | optimizer_facts(read("optimizer_cfg", None) or read("optimizer", None))


def optimizer_facts(cfg: Mapping[str, Any] | None) -> Facts:
    """What the optimizer section of our config says, as ``check_agreement`` takes it."""
    from xtuner_lite.registry import OPTIMIZERS

    if not isinstance(cfg, Mapping) or "type" not in cfg:
        return {}
    kind = cfg["type"] if callable(cfg["type"]) else OPTIMIZERS.get(cfg["type"])
    name = getattr(kind, "__name__", str(cfg["type"]))
    facts: Facts = {"optimizer.type": (name, "optim_wrapper.optimizer.type")}
    parameters = inspect.signature(kind).parameters if callable(kind) else {}
    for key, parameter in parameters.items():
        if key in cfg or parameter.default is not inspect.Parameter.empty:
            value = cfg.get(key, parameter.default)
            facts[f"optimizer.params.{key}"] = (value, f"optim_wrapper.optimizer.{key}")
    return facts


def check_agreement(values: dict[str, Any], facts: Facts, source: str) -> None:
    """Compare a JSON with what our config says.

    Args:
        values: the JSON.
        facts: path in the JSON ('bf16.enabled') -> (our value, its place in our config).
        source: where the JSON comes from.

    Raises:
        ValueError: it says something else; both places and values are named.
    """
    told = []
    for path, (ours, place) in facts.items():
        theirs = _at(values, path)
        if theirs is not None and theirs != AUTO and not _same(theirs, ours):
            told.append(f"{path} is {theirs!r} in {source}, but {place} is {ours!r}")
    if facts.get("fp16.enabled", (False,))[0]:
        told += [
            f"fp16.{key} is {value!r} in {source}, but the loss scale is that of "
            "optim_wrapper.loss_scale alone"
            for key, value in (values.get("fp16") or {}).items()
            if key not in ("enabled", "loss_scale") and value != AUTO
        ]
    if told:
        raise ValueError(
            "the DeepSpeed config contradicts the run's config, which decides: "
            + "; ".join(told)
            + '. Make them equal, or write "auto" or nothing into the DeepSpeed config.'
        )


def _at(values: Any, path: str) -> Any:
    for key in path.split("."):
        if not isinstance(values, dict) or key not in values:
            return None
        values = values[key]
    return values


def _same(theirs: Any, ours: Any) -> bool:
    if isinstance(theirs, str) and isinstance(ours, str):
        return theirs.lower() == ours.lower()
    if isinstance(theirs, (list, tuple)) and isinstance(ours, (list, tuple)):
        return list(theirs) == list(ours)
    return theirs == ours


def _reader(optim_wrapper: Any) -> Callable[[str, Any], Any]:
    """A getter over an OptimWrapper, a config of one, or None."""
    if isinstance(optim_wrapper, Mapping):
        return optim_wrapper.get
    return lambda name, default: getattr(optim_wrapper, name, default)
