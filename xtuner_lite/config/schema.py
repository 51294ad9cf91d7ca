"""What each part of a config is bound to: the callable of untyped sections, the registry of a type.

Signatures are read from the source of the Runner and its parts, so this table names places, not
options: a new option of a section needs no change here.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from typing import Any

from mmengine.config.lazy import LazyAttr, LazyObject

from xtuner_lite.config.names import find
from xtuner_lite.config.origins import KeyPath
from xtuner_lite.config.signatures import (
    Signature,
    signature_of,
    signature_of_object,
)
from xtuner_lite.config.source import NotFound, Unknown, load_module
from xtuner_lite.registry import REGISTRIES, RUNNERS
from xtuner_lite.registry_base import Registry
from xtuner_lite.suggestions import did_you_mean

RUNNER = ("xtuner_lite.runner.runner", "Runner")
DEFAULT_HOOKS = ("xtuner_lite.engine.hooks.defaults", "DEFAULT_HOOKS")

_LOADER = "xtuner_lite.data.dataloader:build_dataloader"

#: Section without a type -> the callable its keys are bound to.
SECTIONS: dict[tuple[str, ...], str] = {
    ("train_dataloader",): _LOADER,
    ("val_dataloader",): _LOADER,
    ("test_dataloader",): _LOADER,
    ("train_cfg",): "xtuner_lite.runner.loops:TrainLoop",
    ("val_cfg",): "xtuner_lite.runner.loops:ValLoop",
    ("test_cfg",): "xtuner_lite.runner.loops:TestLoop",
    ("optim_wrapper",): "xtuner_lite.engine.optim:OptimWrapper",
    ("randomness",): "xtuner_lite.engine.distributed:set_randomness",
    ("env_cfg",): "xtuner_lite.runner.environment:apply_env",
    ("visualizer",): "xtuner_lite.engine.run_visualizer:RunVisualizer",
    ("log_processor",): "mmengine.runner.log_processor:LogProcessor",
    ("compile",): "xtuner_lite.runner.environment:compile_layers",
}

#: Last key of a path -> callable that a dict without a type is bound to, wherever it stands.
SECTION_OF_KEY: dict[str, str] = {
    "data_contract": "xtuner_lite.data.contract:DataContract",
    "datasets": "xtuner_lite.data.mixture:MixtureSource",  # the entries of the list
}

#: Sections whose keys no signature lists.
KEYS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("optim_wrapper", "clip_grad"): ("max_norm", "norm_type"),
    ("optim_wrapper", "paramwise_cfg"): (
        "custom_keys", "bias_lr_mult", "bias_decay_mult", "norm_decay_mult",
    ),
    ("optim_wrapper", "paramwise_cfg", "custom_keys", "*"): (
        "lr", "weight_decay", "lr_mult", "decay_mult",
    ),
    ("env_cfg", "mp_cfg"): ("mp_start_method",),
    ("env_cfg", "dist_cfg"): ("backend", "timeout", "slow_timeout"),
    ("custom_imports",): ("imports", "allow_failed_imports"),
}  # fmt: skip

#: Keys that may stand in a section besides those of its callable.
EXTRA_KEYS: dict[str, tuple[str, ...]] = {
    "optim_wrapper": ("type",),
    "visualizer": ("type", "name"),
    "train_cfg": ("type",),
    "val_cfg": ("type",),
    "test_cfg": ("type",),
    "hooks": ("priority",),
    "param_schedulers": ("convert_to_iter_based",),
}

#: Last key of a path -> registry that a type written as a name is looked up in.
REGISTRY_OF_KEY: dict[str, str] = {
    "model": "models", "llm": "models", "visual_encoder": "models", "tokenizer": "models",
    "dataset": "datasets", "datasets": "datasets", "data": "datasets", "sampler": "samplers",
    "collate_fn": "collators", "optimizer": "optimizers", "param_scheduler": "param_schedulers",
    "strategy": "strategies", "vis_backends": "visbackends", "val_evaluator": "metrics",
    "test_evaluator": "metrics", "metrics": "metrics", "map_fn": "map_fns",
    "dataset_map_fn": "map_fns", "template": "templates", "custom_hooks": "hooks",
    "default_hooks": "hooks", "train_cfg": "loops", "val_cfg": "loops", "test_cfg": "loops",
}  # fmt: skip

#: Last key of a path -> module whose classes may be named without it.
MODULE_OF_KEY = {"lora": "peft", "llm_lora": "peft", "visual_encoder_lora": "peft"}

_LOADING = ("transformers.modeling_utils", ("PreTrainedModel", "from_pretrained"))
_TOKENIZING = ("transformers.models.auto.tokenization_auto", ("AutoTokenizer", "from_pretrained"))

#: Callable with an open ``**kwargs`` -> where they end; only used to see misspelled names.
FORWARDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "load_causal_lm": _LOADING,
    "load_tokenizer": _TOKENIZING,
    "AutoModelForCausalLM.from_pretrained": _LOADING,
    "AutoModel.from_pretrained": _LOADING,
    "AutoModelForImageTextToText.from_pretrained": _LOADING,
}

_FROM_LOADER = ("tokenizer", "accumulative_counts", "shuffle", "seed", "rank", "world_size")
_FROM_LOOP = ("runner", "dataloader", "evaluator")

#: Registry (or section) -> arguments that the Runner fills in.
INJECTED: dict[str, tuple[str, ...]] = {
    "models": ("tokenizer",),
    "datasets": ("tokenizer",),
    "samplers": ("num_samples", "shuffle", "seed", "dataset", "group_size", "world_size", "rank"),
    "collators": ("pad_token_id",),
    "optimizers": ("params",),
    "param_schedulers": ("optimizer", "epoch_length", "max_iters"),
    "loops": _FROM_LOOP,
    "visbackends": ("save_dir",),
    "strategies": ("ranks",),
    "train_dataloader": _FROM_LOADER,
    "val_dataloader": _FROM_LOADER,
    "test_dataloader": _FROM_LOADER,
    "train_cfg": _FROM_LOOP,
    "val_cfg": _FROM_LOOP,
    "test_cfg": _FROM_LOOP,
    "visualizer": ("save_dir", "name"),
    "compile": ("model",),
    "top": ("work_dir", "cfg"),
}


#: Registries of functions that are called later: their first argument is the row or the samples.
CALLED_LATER = ("map_fns", "collators")


@dataclass(frozen=True)
class Target:
    """What a dict of a config is bound to."""

    signature: Signature
    registry: Registry | None  # where its type is looked up; None for a section
    injected: tuple[str, ...]
    extra: tuple[str, ...] = ()


@cache
def runner_signature(runner_type: str | None = None) -> Signature:
    """Signature of the Runner that ``runner_type`` names, the project's own by default."""
    entry = RUNNERS.find(runner_type) if runner_type else None
    module, name = (entry.module, entry.qualname) if entry else RUNNER
    return signature_of(module, (name,))


def top_level_names(runner_type: Any) -> list[str]:
    """The keys a config may have."""
    name = runner_type if isinstance(runner_type, str) else None
    return [key for key in runner_signature(name).names if key != "cfg"]


def registry_of(path: KeyPath) -> Registry | None:
    """The registry a name at ``path`` is looked up in; None where only a path tells."""
    keys = [part for part in path if isinstance(part, str)]
    if keys[:1] == ["default_hooks"] and len(keys) == 2:
        return REGISTRIES["hooks"]
    name = REGISTRY_OF_KEY.get(keys[-1]) if keys else None
    return REGISTRIES[name] if name else None


def section_of(path: KeyPath) -> str | None:
    """'module:name' of the callable that an untyped dict at ``path`` is bound to."""
    names = [part for part in path if isinstance(part, str)]
    return SECTIONS.get(path) or (SECTION_OF_KEY.get(names[-1]) if names else None)


def keys_of(path: KeyPath) -> tuple[str, ...] | None:
    """The keys of a dict bound to no callable that has a fixed set; None where it is free."""
    for pattern, keys in KEYS.items():
        if len(pattern) == len(path) and all(
            sign in ("*", part) for sign, part in zip(pattern, path, strict=True)
        ):
            return keys
    return None


def signature_of_type(kind: Any, path: KeyPath) -> Signature:
    """Signature of what a ``type`` stands for: a name, lazy object, class or function.

    Raises:
        KeyError, NotFound: there is no such name.
        TypeError: it cannot be called.
    """
    if isinstance(kind, str):
        return _signature_of_name(kind, path)
    if isinstance(kind, (LazyObject, LazyAttr)):
        module, names = lazy_path(kind)
        return signature_of(module, names)
    return signature_of_object(kind)


def lazy_path(lazy: LazyObject | LazyAttr) -> tuple[str, tuple[str, ...]]:
    """(module, names below it) of a lazy object."""
    names: list[str] = []
    while isinstance(lazy, LazyAttr):
        names.insert(0, lazy.name)
        lazy = lazy.source
    if lazy._imported is not None:
        names.insert(0, lazy._imported)
    module = lazy._module if isinstance(lazy._module, str) else lazy._module[0].split(".")[0]
    if not isinstance(lazy._module, str):  # import a.b; a.b.C: the longest imported module counts
        for full in sorted(lazy._module, key=len, reverse=True):
            below = full.split(".")[1:]
            if names[: len(below)] == below:
                return full, tuple(names[len(below) :])
    return module, tuple(names)


def _signature_of_name(name: str, path: KeyPath) -> Signature:
    keys = [part for part in path if isinstance(part, str)]
    if keys and keys[-1] in MODULE_OF_KEY and "." not in name:
        return signature_of(MODULE_OF_KEY[keys[-1]], (name,))
    registry = registry_of(path)
    candidates = [registry] if registry is not None else list(REGISTRIES.values())
    for candidate in candidates:
        entry = candidate.find(name.removeprefix("mmengine.").removeprefix("xtuner_lite."))
        if entry is not None:
            held = candidate.module_dict.get(entry.name)
            if held is not None and "<locals>" in entry.qualname:
                return signature_of_object(held)
            return signature_of(entry.module, tuple(entry.qualname.split(".")))
    if "." in name:
        return _signature_of_path(name)
    if registry is not None:
        raise KeyError(registry.unknown(name))
    known = [item for registry in REGISTRIES.values() for item in registry.entries()]
    raise KeyError(
        f"no registry has the name {name!r}{did_you_mean(name, known)} See: xtuner-lite list"
    )


def _signature_of_path(name: str) -> Signature:
    parts = name.split(".")
    error: LookupError = NotFound(parts[0], "", [])
    for depth in range(len(parts) - 1, 0, -1):
        if load_module(".".join(parts[:depth])) is None and depth > 1:
            continue
        try:
            return signature_of(".".join(parts[:depth]), tuple(parts[depth:]))
        except NotFound as caught:
            error = caught
    raise error


def can_be_made(path: KeyPath) -> bool:
    """Whether ``--cfg-options`` may make this section when a config lacks it or has it as None."""
    if len(path) == 2 and path[0] == "default_hooks":
        return path[1] in default_hooks()
    return path == ("default_hooks",) or path in SECTIONS or keys_of(path) is not None


def forwarded_names(signature: Signature) -> list[str]:
    """Names that a callable with an open ``**kwargs`` is known to pass on."""
    target = FORWARDS.get(signature.name)
    return [] if target is None else signature_of(*target).names


@cache
def default_hooks() -> dict[str, Any]:
    """Name -> config of the hooks every run gets, read from the source."""
    found = find(DEFAULT_HOOKS[0], (DEFAULT_HOOKS[1],))
    try:
        assert isinstance(found.node, ast.expr)
        return ast.literal_eval(found.node)
    except ValueError as error:
        raise Unknown(f"{found.place}: DEFAULT_HOOKS must be a literal: {error}") from error


def target_of(path: KeyPath, value: dict[Any, Any]) -> Target | None:
    """What a dict of a config is bound to; None for a dict of free keys.

    Raises:
        KeyError, NotFound, TypeError: its type cannot be resolved.
    """
    kind = dict.get(value, "type")
    if path == ():
        runner = dict.get(value, "runner_type")
        signature = runner_signature(runner if isinstance(runner, str) else None)
        return Target(signature, None, INJECTED["top"])
    if kind is None and len(path) == 2 and path[0] == "default_hooks":
        kind = default_hooks().get(path[1], {}).get("type")
    section = section_of(path)
    key = path[0] if len(path) == 1 else ""
    if kind is None or key in ("optim_wrapper", "visualizer"):
        if section is None:
            return None
        module, _, name = section.partition(":")
        return Target(
            signature_of(module, (name,)), None, INJECTED.get(key, ()), EXTRA_KEYS.get(key, ())
        )
    registry = registry_of(path)
    plural = registry.plural if registry is not None else ""
    injected = INJECTED.get(plural, ()) or INJECTED["models"]
    signature = signature_of_type(kind, path)
    if plural in CALLED_LATER:
        injected = (*injected, *(param.name for param in signature.params[:1]))
    return Target(signature, registry, injected, EXTRA_KEYS.get(plural, ()))
