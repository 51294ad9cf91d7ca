"""YAML and JSON configs: data only. Nothing in them is run, and a type must be one of ours."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from xtuner_lite.config.errors import ConfigError, Problem
from xtuner_lite.config.names import find
from xtuner_lite.config.origins import KeyPath, Origin, dotted, flatten
from xtuner_lite.config.page import Page, PageDict
from xtuner_lite.config.source import NotFound, Unknown
from xtuner_lite.discovery import PLUGIN_ENTRIES

#: Dotted types allowed in data files: what they name must be *defined* under one of these.
ALLOWED_MODULES = (
    "xtuner_lite", "torch.optim", "bitsandbytes.optim", "peft", "mmengine.hooks", "mmengine.optim",
    "mmengine.visualization", "mmengine.dataset", "transformers.models.auto",
    "transformers.utils.quantization_config",
)  # fmt: skip


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, reading 1e-4 as the number it is (YAML 1.1 wants 1.0e-4)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?([eE][-+]?\d+)|\d[\d_]*\.[\d_]*|\.\d[\d_]*([eE][-+]?\d+)?"
               r"|\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+0123456789."),
)  # fmt: skip


def read_data_page(file: Path) -> Page:
    """Read a .yaml, .yml or .json config.

    Raises:
        ConfigError: it does not parse, holds Python objects, names modules to import, or has a type
            that is neither a registered name nor allowed.
    """
    text = file.read_text(encoding="utf-8")
    try:
        values = json.loads(text) if file.suffix == ".json" else yaml.load(text, Loader=_Loader)
        lines = _lines(text)
    except (ValueError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        line = getattr(error, "lineno", None) or (mark.line + 1 if mark else 1)
        raise ConfigError(
            Problem("", f"is not plain {file.suffix[1:]} data: {error}", f"{file}:{line}")
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(
            Problem(
                "", f"holds a {type(values).__name__}; a config is a mapping of keys", str(file)
            )
        )
    page = Page(file, files=[str(file)])
    for name, value in values.items():
        page.values[str(name)] = PageDict._hook(value)
    for path, _ in flatten(page.values):
        if path:
            page.origins[path] = Origin(f"{file}:{_line(path, lines)}")
    problems = [
        problem for path, value in flatten(page.values) for problem in _refused(path, value)
    ]
    if problems:
        raise ConfigError([_placed(problem, page) for problem in problems])
    page.unread = _top_lines(page, lines)
    return page


def _refused(path: KeyPath, value: Any) -> list[Problem]:
    if path in (("custom_imports",), ("plugins",)):
        text = "data files import nothing; give the file with --plugin, or use a Python config"
        return [Problem(dotted(path), text)]
    if path and path[-1] == "type" and isinstance(value, str) and "." in value:
        return _refused_type(path, value)
    return []


def _refused_type(path: KeyPath, value: str) -> list[Problem]:
    module, _, name = value.rpartition(".")
    allowed = (*ALLOWED_MODULES, *PLUGIN_ENTRIES)
    try:
        found = _find_longest(value)
        home = found.module.name
        reason = f"it is defined in {home}"
    except NotFound as error:
        home, reason = "", str(error)
    except Unknown as error:
        home, reason = "", f"what it names cannot be read: {error}"
    if any(f"{home}.".startswith(f"{root}.") for root in allowed):
        return []
    text = (
        f"{value!r} is not allowed in a data file ({reason}); allowed: a registered name (see: "
        f"xtuner-lite list) or a path in {', '.join(ALLOWED_MODULES)}"
    )
    return [Problem(dotted(path), text)]


def _find_longest(value: str) -> Any:
    """The definition of a dotted path, whichever part of it is the module."""
    parts = value.split(".")
    error: LookupError = NotFound(parts[0], "", [])
    for depth in range(len(parts) - 1, 0, -1):
        try:
            return find(".".join(parts[:depth]), tuple(parts[depth:]))
        except (NotFound, Unknown) as caught:
            error = caught
    raise error


def _placed(problem: Problem, page: Page) -> Problem:
    for path, origin in page.origins.items():
        if dotted(path) == problem.key:
            return Problem(problem.key, problem.message, origin.place)
    return problem


def _top_lines(page: Page, lines: dict[KeyPath, int]) -> dict[str, int]:
    return {name: lines.get((name,), 1) for name in page.values}


def _line(path: KeyPath, lines: dict[KeyPath, int]) -> int:
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return lines[path[:length]]
    return 1


def _lines(text: str) -> dict[KeyPath, int]:
    """Path -> line of its key. JSON is read as the YAML it nearly always is."""
    lines: dict[KeyPath, int] = {}
    try:
        root = yaml.compose(text.expandtabs(1), Loader=_Loader)
    except yaml.YAMLError:
        return lines  # JSON that YAML cannot read: json.loads has judged it, lines are unknown

    def visit(node: yaml.Node | None, path: KeyPath) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                lines[(*path, key.value)] = key.start_mark.line + 1
                visit(value, (*path, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                lines[(*path, index)] = value.start_mark.line + 1
                visit(value, (*path, index))

    visit(root, ())
    return lines
