"""Configs: load, check, write back, list, copy. Names are resolved lazily; torch stays out."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xtuner_lite.config.catalog import configs_dir, copy_config, find_config, list_configs
    from xtuner_lite.config.check import check_config
    from xtuner_lite.config.dump import dump_config, format_config
    from xtuner_lite.config.effective import effective_settings, format_settings
    from xtuner_lite.config.errors import ConfigError, Problem, report_problems
    from xtuner_lite.config.load import load_config
    from xtuner_lite.config.redact import redact_config
    from xtuner_lite.plugins import declare_plugins, load_plugins

_HOMES = {
    "configs_dir": "xtuner_lite.config.catalog",
    "copy_config": "xtuner_lite.config.catalog",
    "find_config": "xtuner_lite.config.catalog",
    "list_configs": "xtuner_lite.config.catalog",
    "check_config": "xtuner_lite.config.check",
    "dump_config": "xtuner_lite.config.dump",
    "format_config": "xtuner_lite.config.dump",
    "effective_settings": "xtuner_lite.config.effective",
    "format_settings": "xtuner_lite.config.effective",
    "ConfigError": "xtuner_lite.config.errors",
    "Problem": "xtuner_lite.config.errors",
    "report_problems": "xtuner_lite.config.errors",
    "load_config": "xtuner_lite.config.load",
    "redact_config": "xtuner_lite.config.redact",
    "declare_plugins": "xtuner_lite.plugins",
    "load_plugins": "xtuner_lite.plugins",
}

__all__ = [
    "ConfigError",
    "Problem",
    "check_config",
    "configs_dir",
    "copy_config",
    "declare_plugins",
    "dump_config",
    "effective_settings",
    "find_config",
    "format_config",
    "format_settings",
    "list_configs",
    "load_config",
    "load_plugins",
    "redact_config",
    "report_problems",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
