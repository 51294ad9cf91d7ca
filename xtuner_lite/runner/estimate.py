"""From a config to the memory it needs: what ``xtuner-lite estimate`` prints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner_lite.engine.memory import PLACEMENTS, DeviceMemory, Placement, shards_weights
from xtuner_lite.engine.precision import choose_dtype
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.models.llava import load_visual_encoder
from xtuner_lite.models.loading import load_causal_lm
from xtuner_lite.models.memory import ActivationsUnknownError
from xtuner_lite.models.skeleton import config_folder, read_config
from xtuner_lite.registry import MODELS
from xtuner_lite.runner.memory_plan import Change, MemoryPlanner, Plan, Sight, best_changes

if TYPE_CHECKING:
    from mmengine.config import Config
    from transformers import PretrainedConfig

GIB = 2**30
#: Share of a device's memory that a run may plan with; the rest is the CUDA context, the libraries'
#: workspaces and what the allocator cannot use.
USABLE = 0.9

#: Elements; reduce_bucket_size of a JSON that does not say it (deepspeed/runtime/zero/config.py).
DEEPSPEED_BUCKET = 500_000_000

#: What of the config's model the planner makes itself, or what memory does not depend on.
_PARTS = ("llm", "visual_encoder", "visual_select_strategy", "pretrained_pth")

COLUMNS = tuple(f.name for f in fields(DeviceMemory) if f.name != "host")


class EstimateError(ValueError):
    """A config whose memory cannot be worked out."""

    exit_code = 2


@dataclass(frozen=True)
class Estimate:
    """Memory of a config: as it is, under every strategy, and after the changes that help most."""

    plan: Plan
    model_name: str
    trainable: int
    frozen: int
    table: dict[Placement, DeviceMemory]
    changes: list[Change]
    notes: list[str]


def estimate(
    cfg: Config,
    *,
    devices: int = 1,
    placement: Placement | None = None,
    deepspeed: str | None = None,
    device_type: str = "cuda",
    max_length: int | None = None,
) -> Estimate:
    """Works out the memory of a checked config; loads no weights and no data.

    Args:
        cfg: passed by ``check_config``.
        devices: processes of the run, one device each.
        placement: strategy in place of the config's.
        deepspeed: as ``xtuner-lite train --deepspeed``; in place of the config's strategy.
        device_type: 'cuda' or 'cpu': what the run's devices are.
        max_length: tokens of a sample, for data whose config does not say it.

    Raises:
        EstimateError: the model is not described by load_causal_lm (and load_visual_encoder); or
            the length is not known.
        ModelNotHereError: there is no config.json of the model.
        ActivationsUnknownError: the model's code cannot be run without its values.
    """
    llm = dict(cfg["model"].items()).get("llm")
    if not isinstance(llm, dict) or MODELS.resolve(llm["type"]) is not load_causal_lm:
        raise EstimateError(
            "estimate reads the model's config.json by the path in model.llm, "
            f"dict(type=load_causal_lm, path=...); this config has {llm!r}. Of other models, run a "
            "few steps (train_cfg.max_iters=3) and read the memory in the log"
        )
    trusts = bool(llm.get("trust_remote_code"))
    folder = config_folder(
        llm["path"], hub=llm.get("hub", "huggingface"), revision=llm.get("revision")
    )
    config = read_config(folder, trust_remote_code=trusts)
    _refuse_quantized(config)
    wrapper = cfg["optim_wrapper"]
    loader = cfg["train_dataloader"]
    zero: dict[str, int] = {}
    strategy = dict((cfg.get("strategy") or {}).items())
    if deepspeed is not None:
        placement, zero = deepspeed_placement(deepspeed)
    elif placement is None:
        placement, zero = strategy_placement(strategy, devices)
    dtype = wrapper.get("dtype", "auto")
    if dtype == "auto":
        dtype = "bf16" if device_type == "cuda" else choose_dtype("cpu")[0]
    plan = Plan(
        method={key: value for key, value in cfg["model"].items() if key not in _PARTS},
        optimizer=dict(wrapper["optimizer"].items()),
        batch_size=loader.get("batch_size", 1),
        length=max_length or sample_length(loader),
        dtype=dtype,
        quantization=llm.get("quantization"),
        attn=llm.get("attn", "auto"),
        device_type=device_type,
        placement=placement,
        devices=devices,
        accumulative_counts=wrapper.get("accumulative_counts", 1),
        zero=zero,
        half_weights=strategy.get("half_weights"),
    )
    tower = dict(cfg["model"].items()).get("visual_encoder")
    sight = None if tower is None else _sight(tower, cfg)
    planner = MemoryPlanner(config, trust_remote_code=trusts, sight=sight)
    method = planner.method(plan)
    shown = [
        p
        for p in PLACEMENTS
        if p == plan.placement
        or not (p == "ddp" and devices == 1)
        and not (plan.quantization is not None and shards_weights(p))
    ]
    table, notes = {}, list(_notes(plan, method))
    if sight is not None:
        notes.append(
            f"with {sight.num_images(plan)} images of {sight.image_size} x {sight.image_size} "
            f"pixels ({sight.num_image_tokens} tokens each), the most that {plan.batch_size} x "
            f"{plan.length:,} tokens can hold"
        )
    size = planner.size(plan)
    for other in shown:
        try:
            table[other] = planner.memory(replace(plan, placement=other))
        except ActivationsUnknownError as error:
            notes.append(f"{other} is left out: {error}")
    return Estimate(
        plan=plan,
        model_name=" + ".join(str(part["path"]) for part in (llm, tower) if part),
        trainable=size.trainable,
        frozen=size.frozen,
        table=table,
        changes=best_changes(planner, plan),
        notes=notes,
    )


def _sight(part: Any, cfg: Config) -> Sight:
    """What the LLaVA of a config sees, by its tokenizer's settings and the tower's config.json."""
    if not isinstance(part, dict) or MODELS.resolve(part["type"]) is not load_visual_encoder:
        raise EstimateError(
            "estimate reads the vision tower's config.json by the path in model.visual_encoder, "
            f"dict(type=load_visual_encoder, path=...); this config has {part!r}"
        )
    folder = config_folder(
        part["path"], hub=part.get("hub", "huggingface"), revision=part.get("revision")
    )
    tower = read_config(folder)
    tower = getattr(tower, "vision_config", None) or tower
    tokenizer = cfg.get("tokenizer") or {}
    given = cfg["model"].get("visual_select_strategy")
    strategy = given or tokenizer.get("visual_select_strategy", "default")
    return Sight(tower, tokenizer.get("image_size") or tower.image_size, strategy)


def strategy_placement(strategy: Any, devices: int) -> tuple[Placement, dict[str, int]]:
    """(placement, keywords of device_memory) of a config's ``strategy``.

    Raises:
        EstimateError: a strategy this module does not know.
    """
    if not strategy:
        return ("single" if devices == 1 else "ddp"), {}
    settings = dict(strategy.items())
    kind = settings.pop("type")
    name = str(getattr(kind, "__name__", kind)).rpartition(".")[2]
    if name == "DeepSpeed":
        return deepspeed_placement(settings.get("config"))
    offload = any(value for key, value in settings.items() if "offload" in key)
    known = {"SingleDevice": "single", "DDP": "ddp", "FSDP2": "fsdp2"}
    if name not in known:
        raise EstimateError(
            f"the memory of strategy {name!r} is not known; choose one by --strategy "
            f"{{{','.join(PLACEMENTS)}}}"
        )
    placement = known[name] + ("_offload" if offload and name == "FSDP2" else "")
    return placement, {}  # type: ignore[return-value]


def deepspeed_placement(config: Any) -> tuple[Placement, dict[str, int]]:
    """(placement, keywords of device_memory) of a preset's name, a JSON file or its content.

    Raises:
        EstimateError: none of the three, or no ZeRO stage from 1 to 3 in it.
    """
    if isinstance(config, str) and config.removeprefix("deepspeed_") in PLACEMENTS:
        return config.removeprefix("deepspeed_"), {}  # type: ignore[return-value]
    if isinstance(config, str) and Path(config).is_file():
        config = json.loads(Path(config).read_text(encoding="utf-8"))
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (1, 2, 3):
        names = ", ".join(p for p in PLACEMENTS if p.startswith("zero"))
        raise EstimateError(
            f"deepspeed is {config!r}; give {names}, or a JSON file with "
            "zero_optimization.stage 1, 2 or 3"
        )
    offload = any(
        (zero.get(key) or {}).get("device", "none") != "none"
        for key in ("offload_optimizer", "offload_param")
    )
    if offload and stage == 1:
        raise EstimateError("deepspeed offloads from ZeRO stage 2 on; set zero_optimization.stage")
    names = {
        "reduce_bucket": ("reduce_bucket_size",),
        "max_live_parameters": ("max_live_parameters", "stage3_max_live_parameters"),
    }
    sizes = {"reduce_bucket": DEEPSPEED_BUCKET} | {
        name: int(zero[key])
        for name, keys in names.items()
        for key in keys
        if isinstance(zero.get(key), (int, float))
    }
    return f"zero{stage}{'_offload' if offload else ''}", sizes  # type: ignore[return-value]


def sample_length(loader: Any) -> int:
    """Tokens of a sample: the largest max_length anywhere in the data's config.

    Raises:
        EstimateError: there is none.
    """
    found = list(_values(loader, "max_length"))
    if not found:
        raise EstimateError(
            "the config's data names no max_length, so the tokens of a sample are not known; give "
            "--max-length N"
        )
    return max(found)


def _values(part: Any, key: str) -> Iterator[int]:
    if isinstance(part, dict):
        for name, value in part.items():
            if name == key and isinstance(value, int):
                yield value
            else:
                yield from _values(value, key)
    elif isinstance(part, (list, tuple)):
        for value in part:
            yield from _values(value, key)


def _refuse_quantized(config: PretrainedConfig) -> None:
    saved = getattr(config, "quantization_config", None)
    if saved is not None:
        raise EstimateError(
            f"the model is stored quantised ({saved}), which estimate does not know; name the "
            "model it was made from, with model.llm.quantization='4bit' or '8bit'"
        )


def _notes(plan: Plan, method: Any) -> Iterator[str]:
    if not isinstance(method, SupervisedFinetune):
        yield (
            f"activations are those of one pass over {plan.batch_size} samples; "
            f"{type(method).__name__} may make several"
        )
    if plan.quantization is not None and shards_weights(plan.placement):
        yield f"{plan.placement} refuses a quantised base; use DDP or ZeRO-2"
