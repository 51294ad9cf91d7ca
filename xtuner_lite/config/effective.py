"""Every setting that a run will use, defaults included, with where it came from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from mmengine.config import Config

from xtuner_lite.config.origins import KeyPath, Provenance, dotted, provenance_of
from xtuner_lite.config.redact import redact
from xtuner_lite.config.schema import default_hooks, target_of
from xtuner_lite.config.source import NotFound
from xtuner_lite.plugins import declare_plugins


class Setting(NamedTuple):
    """One line of the print."""

    key: str  # dotted path
    value: Any  # redacted; lazy objects as they are
    origin: (
        str  # 'file:line', 'file:line (setting)', 'command line', 'default of SupervisedFinetune'
    )


def effective_settings(cfg: Config) -> list[Setting]:
    """Every setting of a config and every default its parts add, secrets hidden.

    Sections that are not given and whose default is None are left out.
    """
    declare_plugins(cfg)
    provenance = provenance_of(cfg)
    return list(_walk((), redact(cfg._cfg_dict), provenance))


def format_settings(settings: list[Setting]) -> str:
    """The settings as text, one a line, in three columns; files relative to the working folder."""
    here = f"{os.getcwd()}{os.sep}"
    rows = [(item.key, _shown(item.value), item.origin.removeprefix(here)) for item in settings]
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    widths[1] = min(widths[1], 48)
    return "\n".join(
        f"{key:<{widths[0]}}  {value:<{widths[1]}}  {origin}".rstrip()
        for key, value, origin in rows
    )


def _walk(path: KeyPath, value: Any, provenance: Provenance) -> Iterator[Setting]:
    if isinstance(value, dict) and value:
        for key, item in dict.items(value):
            yield from _walk((*path, key), item, provenance)
        yield from _defaults(path, value)
    elif isinstance(value, (list, tuple)) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _walk((*path, index), item, provenance)
    else:
        origin = provenance.origins.get(path)
        yield Setting(dotted(path), value, str(origin) if origin else "set in Python")


def _defaults(path: KeyPath, value: dict[Any, Any]) -> Iterator[Setting]:
    """What the callable adds to the keys that are given."""
    try:
        target = target_of(path, value)
    except (KeyError, TypeError, NotFound):  # check_config tells it; there is no default to show
        return
    if path == ("default_hooks",):
        for name, hook in default_hooks().items():
            if name not in value:
                yield Setting(dotted((*path, name)), hook["type"], "default hook")
    if target is None:
        return
    for param in target.signature.accepted:
        if param.name in value or param.required or param.name in target.injected:
            continue
        if not path and param.default is None:
            continue
        origin = f"default of {target.signature.name}"
        yield Setting(dotted((*path, param.name)), param.default, origin)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
