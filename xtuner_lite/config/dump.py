"""Writes a config as one Python page that loads equal to it, without secrets."""

from __future__ import annotations

import keyword
import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePath
from types import BuiltinFunctionType, FunctionType
from typing import Any

from mmengine.config import Config
from mmengine.config.lazy import LazyAttr, LazyObject

from xtuner_lite.config.errors import ConfigError, Problem
from xtuner_lite.config.names import Definition, find
from xtuner_lite.config.origins import KeyPath, Provenance, dotted, provenance_of
from xtuner_lite.config.page import PAGE_MODULE
from xtuner_lite.config.redact import redact
from xtuner_lite.config.schema import lazy_path
from xtuner_lite.config.source import NotFound, Unknown
from xtuner_lite.discovery import PLUGIN_FILES
from xtuner_lite.registry import REGISTRIES

_WIDTH = 100
_INDENT = "    "


def dump_config(cfg: Config, path: str | os.PathLike[str]) -> Path:
    """Write a config to a .py file; ``load_config`` of it gives an equal config.

    Secrets are replaced by '***' first. The file is written aside and renamed.

    Returns:
        The file.

    Raises:
        ConfigError: a value that cannot be written back (a function of the config, a set, an
            object), with its place; nothing is written then.
        ValueError: the path does not end in .py.
    """
    target = Path(path)
    if target.suffix != ".py":
        raise ValueError(f"a config is written as a Python page, got {target}; end the name in .py")
    text = format_config(cfg)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)
    return target


def format_config(cfg: Config) -> str:
    """The page as text; see :func:`dump_config`."""
    values = redact(cfg._cfg_dict if isinstance(cfg, Config) else cfg)
    writer = _Writer(values, provenance_of(cfg))
    body = []
    for name, value in dict.items(values):
        if not _is_name(name):
            raise ConfigError(Problem(str(name), "a top-level key must be a Python name"))
        body.append(f"{name} = {writer.value(value, (name,), 0, len(name) + 3)}\n")
    if writer.problems:
        raise ConfigError(writer.problems)
    imports = "".join(f"{line}\n" for line in writer.imports())
    return f"{imports}\n{''.join(body)}" if imports else "".join(body)


def configs_equal(a: Any, b: Any) -> bool:
    """Whether two configs, or values of configs, are the same: types too, and nan equals nan."""
    if isinstance(a, Config) and isinstance(b, Config):
        return configs_equal(a._cfg_dict, b._cfg_dict)
    if isinstance(a, dict) and isinstance(b, dict):
        same_keys = list(dict.keys(a)) == list(dict.keys(b)) or set(a.keys()) == set(b.keys())
        return same_keys and all(
            configs_equal(dict.__getitem__(a, key), dict.__getitem__(b, key))
            for key in dict.keys(a)
        )
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(configs_equal, a, b))
    if isinstance(a, (LazyObject, LazyAttr, type, FunctionType)):
        known = isinstance(b, (LazyObject, LazyAttr, type, FunctionType))
        return known and _import_path(a) == _import_path(b)
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    return type(a) is type(b) and a == b


def _import_path(value: Any) -> tuple[str, ...]:
    if isinstance(value, (LazyObject, LazyAttr)):
        module, names = lazy_path(value)
        return (*module.split("."), *names)
    return (*value.__module__.split("."), *value.__qualname__.split("."))


class _Writer:
    """Turns values into source text, collecting the imports they need."""

    def __init__(self, values: dict[str, Any], provenance: Provenance) -> None:
        self.provenance = provenance
        self.problems: list[Problem] = []
        self.names: dict[tuple[str, str], str] = {}  # (module, name) -> name on the page
        self.taken: set[str] = {*dict.keys(values), "dict", "float"}

    def imports(self) -> Iterator[str]:
        """The import lines, sorted by module."""
        for (module, name), used in sorted(self.names.items()):
            renamed = f" as {used}" if used != name else ""
            yield f"from {module} import {name}{renamed}"

    def value(self, value: Any, path: KeyPath, depth: int, column: int) -> str:
        """Source text of one value that starts in ``column`` of a line indented ``depth`` times."""
        if isinstance(value, dict):
            return self._dict(value, path, depth, column)
        if type(value) in (list, tuple):
            return self._sequence(value, path, depth, column)
        return self._scalar(value, path)

    def _scalar(self, value: Any, path: KeyPath) -> str:
        if isinstance(value, float) and not math.isfinite(value):
            return f'float("{value}")'
        if (
            value is None
            or value is Ellipsis
            or type(value) in (bool, int, float, str, bytes, complex)
        ):
            return repr(value)
        if isinstance(value, (LazyObject, LazyAttr)):
            return self._imported(*lazy_path(value), path)
        if isinstance(value, PurePath):
            return f"{self._name('pathlib', 'Path')}({str(value)!r})"
        if isinstance(value, (type, FunctionType, BuiltinFunctionType)):
            return self._object(value, path)
        return self._refuse(path, _reason(value))

    def _object(self, value: Any, path: KeyPath) -> str:
        """A class or function: by import, or by its registered name if a plug-in file made it."""
        module, qualname = value.__module__ or "", value.__qualname__
        if module in PLUGIN_FILES:
            for registry in REGISTRIES.values():
                for name, part in registry.module_dict.items():
                    if part is value:
                        return repr(name)
        importable = module not in PLUGIN_FILES and module not in (
            "__main__",
            PAGE_MODULE,
        )
        if importable and "<" not in qualname:
            return self._imported(module, tuple(qualname.split(".")), path)
        code = getattr(value, "__code__", None)
        place = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
        return self._refuse(
            path,
            f"{qualname!r}{place} is defined where no import reaches it, so the page could not be "
            f"loaded again; put it into a module, or register it in a file given with --plugin",
        )

    def _imported(self, module: str, names: tuple[str, ...], path: KeyPath) -> str:
        """``from module import Name`` and the text that uses it, for a path below a module."""
        while names and _is_module(module, names[:1]):
            module, names = f"{module}.{names[0]}", names[1:]
        if not names:
            parent, _, last = module.rpartition(".")
            if not parent:
                return self._refuse(path, f"the module {module!r} is no value of a config")
            return self._name(parent, last)
        return ".".join([self._name(module, names[0]), *names[1:]])

    def _name(self, module: str, name: str) -> str:
        key = (module, name)
        if key not in self.names:
            used, number = name, 2
            while used in self.taken:
                used, number = f"{name}_{number}", number + 1
            self.taken.add(used)
            self.names[key] = used
        return self.names[key]

    def _dict(self, value: dict[Any, Any], path: KeyPath, depth: int, column: int) -> str:
        items = list(dict.items(value))
        as_call = all(isinstance(key, str) and _is_name(key) for key, _ in items)
        parts = []
        for key, item in items:
            if not as_call and not isinstance(key, (str, int, float, bool, type(None), tuple)):
                self._refuse((*path, key), f"{key!r} cannot be a key of a config that is written")
            start = f"{key}=" if as_call else f"{key!r}: "
            inner = self.value(
                item, (*path, key), depth + 1, len(_INDENT) * (depth + 1) + len(start)
            )
            parts.append(f"{start}{inner}")
        opening, closing = ("dict(", ")") if as_call else ("{", "}")
        return _join(parts, opening, closing, depth, column)

    def _sequence(self, value: Any, path: KeyPath, depth: int, column: int) -> str:
        indent = len(_INDENT) * (depth + 1)
        parts = [
            self.value(item, (*path, index), depth + 1, indent) for index, item in enumerate(value)
        ]
        if isinstance(value, list):
            return _join(parts, "[", "]", depth, column)
        if len(parts) == 1:
            parts = [f"{parts[0]},"]
            return f"({parts[0]})"
        return _join(parts, "(", ")", depth, column)

    def _refuse(self, path: KeyPath, reason: str) -> str:
        origin = self.provenance.origin(path)
        self.problems.append(Problem(dotted(path), reason, origin.value_place))
        return "None"


def _join(parts: list[str], opening: str, closing: str, depth: int, column: int) -> str:
    one_line = f"{opening}{', '.join(parts)}{closing}"
    if "\n" not in one_line and column + len(one_line) < _WIDTH and (len(parts) < 5 or depth > 1):
        return one_line
    if not parts:
        return one_line
    inner = "".join(f"{_INDENT * (depth + 1)}{part},\n" for part in parts)
    return f"{opening}\n{inner}{_INDENT * depth}{closing}"


def _is_name(text: Any) -> bool:
    return isinstance(text, str) and text.isidentifier() and not keyword.iskeyword(text)


def _is_module(module: str, names: tuple[str, ...]) -> bool:
    try:
        found: Definition = find(module, names)
    except (NotFound, Unknown):
        return False
    return found.is_module


def _reason(value: Any) -> str:
    if isinstance(value, (set, frozenset)):
        return "a set has no order and cannot be written back; use a list or a tuple"
    kind = type(value)
    return (
        f"a {kind.__module__}.{kind.__qualname__} object cannot be written into a config; give "
        f"numbers, strings, lists, dicts, or dict(type=..., ...) that builds it"
    )
