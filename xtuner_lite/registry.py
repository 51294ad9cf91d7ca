"""The registries: one per concept, children of mmengine's, so that mmengine's parts resolve too.

A part is registered by ``@HOOKS.register_module()`` and needs no list anywhere: names are found by
reading the package's source (see :mod:`xtuner_lite.discovery`), and a lookup imports the one module
that holds the name. ``xtuner-lite list hooks`` prints what a registry knows.
"""

from __future__ import annotations

import fnmatch

from mmengine import registry as mm

from xtuner_lite.registry_base import Registry

#: Training methods and models.
MODELS = Registry("model", "models", parent=mm.MODELS)
#: Map-style datasets.
DATASETS = Registry(
    "dataset", "datasets", parent=mm.DATASETS, stock=(("mmengine.dataset", "DATASETS"),)
)
#: A source row -> messages or text.
MAP_FNS = Registry("map function", "map_fns")
#: Named chat-template presets.
TEMPLATES = Registry("template", "templates")
#: Named system prompts.
SYSTEM_PROMPTS = Registry("system prompt", "system_prompts")
#: List of samples -> Batch.
COLLATORS = Registry("collator", "collators")
#: Order of samples.
SAMPLERS = Registry(
    "sampler",
    "samplers",
    parent=mm.DATA_SAMPLERS,
    stock=(("mmengine.dataset.sampler", "DATA_SAMPLERS"),),
)
#: What happens around the loop.
HOOKS = Registry("hook", "hooks", parent=mm.HOOKS, stock=(("mmengine.hooks", "HOOKS"),))
#: Train, val and test loops.
LOOPS = Registry("loop", "loops", parent=mm.LOOPS)
#: Assembles everything and runs it.
RUNNERS = Registry("runner", "runners", parent=mm.RUNNERS)
#: One device .. ZeRO-3.
STRATEGIES = Registry("strategy", "strategies", parent=mm.STRATEGIES)
#: torch.optim's and bitsandbytes' classes by name, and our own.
OPTIMIZERS = Registry(
    "optimizer",
    "optimizers",
    parent=mm.OPTIMIZERS,
    namespaces=("torch.optim", "bitsandbytes.optim"),
)
#: Learning-rate, momentum and weight-decay schedules.
PARAM_SCHEDULERS = Registry(
    "scheduler",
    "param_schedulers",
    parent=mm.PARAM_SCHEDULERS,
    stock=(("mmengine.optim.scheduler", "PARAM_SCHEDULERS"),),
)
#: Validation and test metrics.
METRICS = Registry(
    "metric", "metrics", parent=mm.METRICS, stock=(("mmengine.evaluator", "METRICS"),)
)
#: Where curves and settings go.
VISBACKENDS = Registry(
    "visualisation back-end",
    "visbackends",
    parent=mm.VISBACKENDS,
    stock=(("mmengine.visualization.vis_backend", "VISBACKENDS"),),
)

REGISTRIES: dict[str, Registry] = {
    registry.plural: registry
    for registry in (
        MODELS, DATASETS, MAP_FNS, TEMPLATES, SYSTEM_PROMPTS, COLLATORS, SAMPLERS, HOOKS, LOOPS,
        RUNNERS, STRATEGIES, OPTIMIZERS, PARAM_SCHEDULERS, METRICS, VISBACKENDS,
    )
}  # fmt: skip


def describe(registry: Registry, pattern: str | None = None) -> list[tuple[str, str, str]]:
    """(name, place, one-line description) of a registry's parts, without importing them.

    Args:
        registry: one of :data:`REGISTRIES`.
        pattern: wildcards (``*adam*``) or a part of the name, in any case; None for all.
    """
    wanted = None if pattern is None else pattern.lower()
    if wanted is not None and not any(sign in wanted for sign in "*?["):
        wanted = f"*{wanted}*"
    return [
        (entry.name, entry.place if entry.line else entry.module, entry.description)
        for entry in registry.entries().values()
        if wanted is None or fnmatch.fnmatchcase(entry.name.lower(), wanted)
    ]
