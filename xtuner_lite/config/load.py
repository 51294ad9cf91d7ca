"""Loads a config: a Python page with its bases, or a YAML or JSON file read as data."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.config.lazy import LazyAttr, LazyObject

from xtuner_lite.config.catalog import SUFFIXES, find_config
from xtuner_lite.config.data_page import read_data_page
from xtuner_lite.config.errors import ConfigError, Problem
from xtuner_lite.config.options import parse_option, set_path
from xtuner_lite.config.origins import (
    COMMAND_LINE,
    KeyPath,
    Origin,
    Provenance,
    attach,
    dotted,
    flatten,
)
from xtuner_lite.config.page import Overrides, Page, run_page
from xtuner_lite.config.schema import can_be_made, top_level_names
from xtuner_lite.suggestions import did_you_mean


def load_config(
    path_or_name: str | Path, overrides: Iterable[str | tuple[str, Any]] = ()
) -> Config:
    """Load a config and apply the changes of the command line; nothing heavy is imported.

    Args:
        path_or_name: a .py, .yaml or .json file, or the name of a shipped config.
        overrides: 'key.path=value' texts, or (key path, value) pairs. A plain setting of a page
            (max_length=4096) is changed where it is assigned, so what is computed from it follows.

    Returns:
        The Runner's keys as an mmengine Config; types are lazy. Where each value came from is kept
        with it (see :mod:`xtuner_lite.config.origins`). Call ``check_config`` before using it.

    Raises:
        ConfigError: the file is missing or does not run, or an override has no such place.
    """
    file = find_config(path_or_name)
    options = [_option(item) for item in overrides]
    if file.suffix not in SUFFIXES:
        allowed = ", ".join(SUFFIXES)
        raise ConfigError(Problem("", f"{file} is no config; allowed endings: {allowed}"))
    try:
        is_python = file.suffix == ".py"
        page = run_page(file, _during_the_run(options)) if is_python else read_data_page(file)
    except RecursionError as error:
        raise ConfigError(Problem("", "a dict or list contains itself", str(file))) from error
    known = top_level_names(page.values.get("runner_type"))
    _apply_options(page, options, known)
    return _as_config(page, known)


def _option(item: str | tuple[str, Any]) -> tuple[KeyPath, Any]:
    if isinstance(item, str):
        return parse_option(item)
    path, value = item
    return parse_option(f"{path}=None")[0], value


def _during_the_run(options: Sequence[tuple[KeyPath, Any]]) -> Overrides:
    """Plain names replace their assignments; paths below settings follow their assignments."""
    during = Overrides()
    known = top_level_names(None)
    for path, value in options:
        if len(path) == 1:
            during.plain[path[0]] = value
        elif path[0] not in known:
            during.nested.setdefault(path[0], []).append((path, value))
    return during


def _apply_options(
    page: Page, options: Sequence[tuple[KeyPath, Any]], known: Sequence[str]
) -> None:
    """Set the Runner's keys after the page has run, so that the command line has the last word."""
    for path, value in options:
        if path[0] in known:
            value = copy.deepcopy(value)
            set_path(page.values, path, value, can_be_made)
            for below in [key for key in page.origins if key[: len(path)] == path]:
                del page.origins[below]
            for below, _ in flatten(value, path):
                page.origins[below] = Origin(COMMAND_LINE)
        elif path[0] not in page.overridden:
            hint = did_you_mean(str(path[0]), [*known, *page.values])
            raise ConfigError(
                Problem(
                    dotted(path),
                    f"the config has no key or setting {path[0]!r}{hint}",
                    COMMAND_LINE,
                )
            )


def _as_config(page: Page, known: Sequence[str]) -> Config:
    values = {name: plain(value) for name, value in page.values.items() if name in known}
    cfg = Config(ConfigDict(values), filename=str(page.file))
    provenance = Provenance(
        origins=page.origins,
        settings={name: value for name, value in page.values.items() if name not in known},
        imports=page.imports,
        files=page.files,
    )
    provenance.problems = _unread_problems(page, known)
    attach(cfg, provenance)
    return cfg


def plain(value: Any) -> Any:
    """A copy with mmengine's ConfigDict throughout and no part shared; lazy objects stay lazy."""
    if isinstance(value, dict):
        result = ConfigDict()
        for key, item in dict.items(value):
            dict.__setitem__(result, key, plain(item))
        return result
    if type(value) in (list, tuple):
        return type(value)(plain(item) for item in value)
    if isinstance(value, (LazyObject, LazyAttr)):
        return value
    return copy.deepcopy(value)


def _unread_problems(page: Page, known: Sequence[str]) -> list[Problem]:
    """Names that nothing reads: a misspelled key, or a setting a base has used up already."""
    problems = []
    for name, line in page.unread.items():
        if name in known:
            continue
        origin = page.origins.get((name,))
        place = f"{page.file}:{line}" if line else (origin.place if origin else str(page.file))
        places = _settable_instead(page, name, known) if name in page.from_base and line else []
        if places:
            text = (
                f"has no effect: only a base reads {name!r}, and it did so before this line; set "
                f"{' and '.join(places)} instead, or give --cfg-options {name}=..."
            )
        else:
            text = (
                f"nothing reads this name, and it is no key of the Runner"
                f"{did_you_mean(name, [*known, *page.values.keys() - {name}])}"
                f" Allowed keys: {', '.join(known)}"
            )
        problems.append(Problem(name, text, place))
    return problems


def _settable_instead(page: Page, name: str, known: Sequence[str]) -> list[str]:
    """Key paths of the Runner's whose value a base took from the setting."""
    return [
        dotted(path)
        for path, origin in page.origins.items()
        if origin.setting == name and path[0] in known
    ]
