"""Curves outside this machine's files: TensorBoard, W&B, MLflow, SwanLab, each by one config line.

    visualizer = dict(vis_backends=[dict(type="TensorboardVisBackend")])

``metrics.jsonl`` is always written (see hooks/logger_hook.py), with or without these.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmengine.config import Config
    from mmengine.visualization import Visualizer

#: Back-end -> (module it imports, what pip installs it by).
REQUIRED_PACKAGES = {
    "TensorboardVisBackend": ("tensorboard", "tensorboard"),
    "WandbVisBackend": ("wandb", "wandb"),
    "MLflowVisBackend": ("mlflow", "mlflow"),
    "SwanLabVisBackend": ("swanlab", "swanlab"),
    "ClearMLVisBackend": ("clearml", "clearml"),
    "NeptuneVisBackend": ("neptune", "neptune"),
    "DVCLiveVisBackend": ("dvclive", "dvclive"),
    "AimVisBackend": ("aim", "aim"),
}


def build_visualizer(
    visualizer: dict[str, Any] | None,
    save_dir: str,
    *,
    cfg: Config | None = None,
    is_main: bool = True,
) -> Visualizer:
    """The visualizer of a run, its back-ends started, before anything heavy is loaded.

    Args:
        visualizer: the config section: ``vis_backends`` (a list of configs or objects), or an
            object that is ready. None: no back-end.
        save_dir: where back-ends put their local files (``<save_dir>/vis_data``).
        cfg: the config of the run. Back-ends get it with its secrets redacted.
        is_main: False on other ranks: nothing is started and nothing is written.

    Raises:
        ImportError: the package of a back-end is not installed; says what to install.
        TypeError: vis_backends is no list of configs.
    """
    from xtuner_lite.engine.run_visualizer import RunVisualizer

    if visualizer is not None and not isinstance(visualizer, dict):
        return visualizer
    options = dict(visualizer or {})
    configs = options.pop("vis_backends", None) or []
    options.pop("type", None)  # MMEngine's configs say type="Visualizer"; there is one here
    if not isinstance(configs, Sequence) or isinstance(configs, str):
        raise TypeError(
            f"visualizer.vis_backends is a {type(configs).__name__}; it must be a list, "
            'e.g. [dict(type="TensorboardVisBackend")]'
        )
    for config in configs:
        _check_package(config)
    backends = [_build_backend(config, save_dir) for config in configs] if is_main else []
    built = RunVisualizer(vis_backends=backends, **options)
    for backend in backends:
        backend.experiment  # noqa: B018  starts it: a missing login must not show after an hour
    if cfg is not None and backends:
        from xtuner_lite.config import redact_config

        built.add_config(redact_config(cfg))
    return built


def add_text(visualizer: Visualizer, name: str, text: str, step: int) -> None:
    """Hands a text to every back-end that can keep one; the others are passed over.

    Args:
        name: what the text is, e.g. ``"chat"``.
        step: optimizer steps done.
    """
    if hasattr(visualizer, "add_text"):
        visualizer.add_text(name, text, step)


def _backend_name(config: Any) -> str:
    kind = config["type"] if isinstance(config, dict) else type(config)
    return kind if isinstance(kind, str) else kind.__name__


def _check_package(config: Any) -> None:
    """Refuses a back-end whose package is missing, with the command that helps."""
    if isinstance(config, dict) and "type" not in config:
        raise TypeError(
            f"visualizer.vis_backends holds {dict(config)} without a type; name a back-end, "
            f"one of {', '.join(REQUIRED_PACKAGES)}"
        )
    name = _backend_name(config).rpartition(".")[2]
    module, package = REQUIRED_PACKAGES.get(name, (None, None))
    if module is not None and importlib.util.find_spec(module) is None:
        raise ImportError(
            f"visualizer.vis_backends names {name}, but the package {module!r} is not installed. "
            f"Run: pip install {package}"
        )


def _build_backend(config: Any, save_dir: str) -> Any:
    """A back-end from its config; an object is taken as it is."""
    from pathlib import Path

    from xtuner_lite.registry import VISBACKENDS

    if not isinstance(config, dict):
        return config
    config = dict(config)
    config.setdefault("save_dir", str(Path(save_dir) / "vis_data"))
    if isinstance(config["type"], type) and config["type"].__module__.startswith("mmengine."):
        # Ours replace those of MMEngine that today's packages refuse; same name, same options.
        config["type"] = config["type"].__name__
    logging.getLogger(__name__).debug("starting %s", _backend_name(config))
    return VISBACKENDS.build(config)
