"""DeepSpeed's JSON: read, and checked key by key against the installed DeepSpeed.

A JSON may say anything that our config does not: ZeRO stage, offload, buckets. What our config says
too (batch size, accumulation, clipping, precision, optimizer) must agree or be "auto"; see
deepspeed_agreement.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from xtuner_lite.suggestions import did_you_mean

AUTO = "auto"

#: Elements in one exchange: 200 MB of float32; DeepSpeed's default of 5e8 takes 2 GB.
_BUCKETS = {"reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}
_PINNED = {"device": "cpu", "pin_memory": True}

#: Name -> DeepSpeed configuration; XTuner's names (deepspeed_zero2) are understood too.
PRESETS: dict[str, dict[str, Any]] = {
    "zero1": {"zero_optimization": {"stage": 1, **_BUCKETS}},
    "zero2": {"zero_optimization": {"stage": 2, **_BUCKETS}},
    "zero2_offload": {"zero_optimization": {"stage": 2, **_BUCKETS, "offload_optimizer": _PINNED}},
    "zero3": {"zero_optimization": {"stage": 3, **_BUCKETS}},
    "zero3_offload": {
        "zero_optimization": {
            "stage": 3, **_BUCKETS, "offload_optimizer": _PINNED, "offload_param": _PINNED,
        }
    },
}  # fmt: skip

#: Sections and values that our config has too; compared in deepspeed_agreement.
_OURS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "optimizer", "bf16", "fp16",
)  # fmt: skip

#: Handed to DeepSpeed as they stand.
_PASSED = (
    "zero_optimization", "communication_data_type", "prescale_gradients",
    "gradient_predivide_factor", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level",
    "comms_logger", "flops_profiler", "disable_python_gc",
)  # fmt: skip

#: Keys that DeepSpeed knows and this strategy does not take, with what to do; other keys that
#: DeepSpeed knows are refused with the general reason below.
_NOT_TAKEN = {
    "scheduler": "the schedule is param_scheduler of the config; drop the section",
    "activation_checkpointing": "set model.activation_checkpointing=True in the config instead",
    "data_types": "the strategy sets it: gradients are summed in float32",
    "managed_gradient_accumulation": "the training loop says where a step ends",
    "torch_autocast": "precision is optim_wrapper.dtype of the config",
    "checkpoint": "checkpoints are the checkpoint hook's; drop the section",
    "dataloader_drop_last": "the data loader is train_dataloader of the config",
    "aio": "offload to NVMe is not supported; use device 'cpu'",
}
_GENERAL = "xtuner_lite does this itself or not at all; drop the key"

_OPTIMIZER_KEYS = ("type", "params")


def read_config(config: str | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """(the configuration, where it comes from) of a preset's name, a JSON file or a dict.

    Raises:
        FileNotFoundError: neither a preset nor a file.
        ValueError: not JSON, a key given twice, or no object.
    """
    if isinstance(config, Mapping):
        return copy.deepcopy(_plain(config)), "strategy.config"
    name = str(config).removeprefix("deepspeed_")
    if name in PRESETS:
        return copy.deepcopy(PRESETS[name]), f"DeepSpeed preset {name!r}"
    path = Path(config).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"DeepSpeed config {str(config)!r} is neither a preset ({', '.join(PRESETS)}) nor a "
            f"JSON file that exists{did_you_mean(name, PRESETS)}"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_doubles)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"DeepSpeed config {path} is not valid JSON: {error}") from error
    except _GivenTwice as error:
        raise ValueError(f"DeepSpeed config {path}: key {error} is given twice") from error
    if not isinstance(values, dict):
        raise ValueError(f"DeepSpeed config {path} holds a {type(values).__name__}, not an object")
    return values, str(path)


def check_config(values: dict[str, Any], source: str) -> Any:
    """Check every key by what the installed DeepSpeed knows; returns its parsed ZeRO section.

    Raises:
        ValueError: unknown keys (with the nearest right name), keys that are not taken (with what
            to do), wrong values, or no ZeRO stage.
    """
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    if "bfloat16" in values:  # the old name
        values["bf16"] = values.pop("bfloat16")
    _check_top(values, source)
    zero = values.get("zero_optimization")
    sections = {
        "zero_optimization": (zero, _fields(DeepSpeedZeroConfig)),
        "bf16": (values.get("bf16"), _fields(DeepSpeedBF16Config)),
        "fp16": (values.get("fp16"), _fields(DeepSpeedFP16Config)),
        "optimizer": (values.get("optimizer"), _OPTIMIZER_KEYS),
        "comms_logger": (values.get("comms_logger"), _section_keys("comms_logger")),
        "flops_profiler": (values.get("flops_profiler"), _section_keys("flops_profiler")),
    }
    for part, model in (
        ("offload_optimizer", DeepSpeedZeroOffloadOptimizerConfig),
        ("offload_param", DeepSpeedZeroOffloadParamConfig),
    ):
        section = zero.get(part) if isinstance(zero, dict) else None
        sections[f"zero_optimization.{part}"] = (section, _fields(model))
    for name, (section, known) in sections.items():
        _check_section(section, known, f"{source}: {name}")
    if "stage" not in (zero or {}) or zero["stage"] not in (1, 2, 3):
        raise ValueError(
            f"{source}: zero_optimization.stage is {(zero or {}).get('stage')!r}; it must be 1, 2 "
            "or 3. Without ZeRO use strategy DDP."
        )
    try:
        parsed = DeepSpeedZeroConfig(**without_auto(zero))
    except ValueError as error:  # pydantic's own error names each key
        raise ValueError(f"{source}: zero_optimization: {error}") from error
    _check_zero(parsed, source)
    _check_bf16(values.get("bf16") or {}, DeepSpeedBF16Config(), source)
    return parsed


def _check_top(values: dict[str, Any], source: str) -> None:
    known = _top_level_keys() | set(_OURS) | set(_PASSED) | set(_NOT_TAKEN)
    for key in values:
        if key not in known:
            hint = did_you_mean(key, sorted(known))
            raise ValueError(f"{source}: unknown key {key!r}{hint}")
        if key not in _OURS and key not in _PASSED:
            raise ValueError(f"{source}: {key} is not taken: {_NOT_TAKEN.get(key, _GENERAL)}")


def _check_section(section: Any, known: Iterable[str], where: str) -> None:
    if section is None:
        return
    if not isinstance(section, dict):
        raise ValueError(f"{where} is {section!r}; it must be an object")
    for key in section:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}{did_you_mean(key, known)}")


def _check_zero(zero: Any, source: str) -> None:
    """Refuse what would change the numbers, or hide the state from checkpoints."""
    refused = []
    for part in ("offload_optimizer", "offload_param"):
        offload = getattr(zero, part)
        if offload is not None and str(getattr(offload.device, "value", offload.device)) == "nvme":
            refused.append((f"{part}.device 'nvme'", "use 'cpu'"))
    offload = zero.offload_optimizer
    if offload is not None and getattr(offload, "ratio", 1.0) != 1.0:
        refused.append(("offload_optimizer.ratio", "its second optimizer ignores schedules"))
    if offload is not None and getattr(offload, "super_offload", False):
        refused.append(("offload_optimizer.super_offload", "not supported; drop it"))
    if zero.stage < 3 and zero.offload_param is not None:
        refused.append(("offload_param", "only stage 3 can offload parameters; use zero3_offload"))
    if getattr(zero, "zenflow", None) is not None:
        refused.append(("zenflow", "not supported; drop it"))
    if not getattr(zero, "compute_grad_norm", True):
        refused.append(("compute_grad_norm", "the norm guards each update; drop the key"))
    if refused:
        told = "; ".join(f"{key} is not taken: {why}" for key, why in refused)
        raise ValueError(f"{source}: zero_optimization: {told}")


def _check_bf16(section: dict[str, Any], defaults: Any, source: str) -> None:
    for key, value in section.items():
        if key != "enabled" and value != AUTO and value != getattr(defaults, key):
            raise ValueError(
                f"{source}: bf16.{key} is not taken: what is updated is kept in float32; drop it"
            )


def without_auto(values: Any) -> Any:
    """``values`` without what is "auto": DeepSpeed takes its default there."""
    if isinstance(values, dict):
        return {key: without_auto(value) for key, value in values.items() if value != AUTO}
    return values


def passed_through(values: dict[str, Any]) -> dict[str, Any]:
    """What goes to DeepSpeed as it stands."""
    return {key: without_auto(values[key]) for key in _PASSED if key in values}


class _GivenTwice(Exception):
    """A key that an object of a JSON file holds twice."""


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise _GivenTwice(repr(key))
        values[key] = value
    return values


def _plain(values: Any) -> Any:
    """Dicts of our config format as plain ones."""
    if isinstance(values, Mapping):
        return {key: _plain(value) for key, value in values.items()}
    return [_plain(v) for v in values] if isinstance(values, (list, tuple)) else values


def _fields(model: Any) -> set[str]:
    aliases = {field.alias for field in model.model_fields.values() if field.alias}
    return set(model.model_fields) | aliases


class _Recorder(dict):
    """A dict that is empty and remembers which keys it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return False

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return default

    def keys(self) -> Any:
        return self


def _top_level_keys() -> set[str]:
    """The keys that the installed DeepSpeed reads, found by letting it read nothing."""
    from deepspeed.runtime import config as deepspeed_config

    recorder = _Recorder()
    parser = object.__new__(deepspeed_config.DeepSpeedConfig)
    parser._initialize_params(recorder)
    removed = getattr(deepspeed_config, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", {})
    return recorder.asked | set(removed)


def _section_keys(name: str) -> set[str]:
    if name == "comms_logger":
        from deepspeed.comm.config import CommsLoggerConfig

        return _fields(CommsLoggerConfig)
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig

    return set(vars(DeepSpeedFlopsProfilerConfig({})))
