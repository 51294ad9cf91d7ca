"""Where every value of a config was set: file and line, through bases, updates and settings."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

KeyPath = tuple[Any, ...]  # keys and list indices: ("custom_hooks", 0, "interval")

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Origin:
    """Where a key was written, and where its value came from if that is another line."""

    place: str  # 'file:line' of the key, or 'command line'
    setting: str | None = None  # the plain name whose value it is: max_length=max_length
    setting_place: str | None = None  # where that name was assigned

    @property
    def value_place(self) -> str:
        """Where to change the value."""
        return self.setting_place or self.place

    def __str__(self) -> str:
        return f"{self.value_place} ({self.setting})" if self.setting else self.place


@dataclass(frozen=True)
class LazyImport:
    """``from module import name`` in a config; ``name`` is None for ``import module``."""

    module: str
    name: str | None
    place: str


@dataclass
class Provenance:
    """What is known about a loaded config besides its values."""

    origins: dict[KeyPath, Origin] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)  # plain names that are no Runner keys
    imports: list[LazyImport] = field(default_factory=list)
    problems: list[Any] = field(default_factory=list)  # Problem: names nothing reads
    files: list[str] = field(default_factory=list)  # the page and its bases

    def origin(self, path: KeyPath) -> Origin:
        """Origin of the path, or of the nearest container that has one."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return Origin(self.files[0] if self.files else "")


_ATTRIBUTE = "_xtuner_lite_provenance"


def attach(cfg: Any, provenance: Provenance) -> None:
    """Keep the provenance with a Config (mmengine's own __setattr__ would make it a key)."""
    object.__setattr__(cfg, _ATTRIBUTE, provenance)


def provenance_of(cfg: Any) -> Provenance:
    """The provenance of a Config; an empty one for a Config made in Python."""
    found = getattr(cfg, "__dict__", {}).get(_ATTRIBUTE)
    return found if found is not None else Provenance()


def dotted(path: KeyPath) -> str:
    """('custom_hooks', 0, 'interval') -> 'custom_hooks.0.interval'."""
    return ".".join(str(part) for part in path)


def flatten(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every (path, value) below and including ``value``, containers before what they hold."""
    yield path, value
    if isinstance(value, dict):
        for key, item in dict.items(value):
            yield from flatten(item, (*path, key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from flatten(item, (*path, index))


class OriginTracker:
    """Follows the values of a page while its statements run, one at a time."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.origins: dict[KeyPath, Origin] = {}
        self._seen: dict[KeyPath, Any] = {}

    def adopt(self, name: str, value: Any, original: str, origins: dict[KeyPath, Origin]) -> None:
        """Take over the name of a base page, with the origins it has there."""
        for path, item in flatten(value, (name,)):
            self.origins[path] = origins.get((original, *path[1:]), Origin(self.file))
            self._seen[path] = item

    def record(self, statement: ast.stmt, values: dict[str, Any]) -> None:
        """Note what a statement that has just run set or changed."""
        written = {path: (line, via) for path, line, via in _written(statement, values)}
        now: dict[KeyPath, Any] = {}
        for name, value in values.items():
            for path, item in flatten(value, (name,)):
                now[path] = item
        origins: dict[KeyPath, Origin] = {}
        for path, item in now.items():
            known = self.origins.get(path)
            prefix = _longest(path, written)
            if known is not None and prefix is None and _same(self._seen.get(path, self), item):
                origins[path] = known
            else:
                line, via = written[prefix] if prefix is not None else (statement.lineno, None)
                origins[path] = self._origin(path, prefix or path, line, via)
        self.origins, self._seen = origins, now

    def set(self, path: KeyPath, value: Any, place: str) -> None:
        """Note a value set from outside the page."""
        for below, item in flatten(value, path):
            self.origins[below] = Origin(place)
            self._seen[below] = item

    def _origin(self, path: KeyPath, prefix: KeyPath, line: int, via: str | None) -> Origin:
        place = f"{self.file}:{line}"
        if via is None:
            return Origin(place)
        source = self.origins.get((via, *path[len(prefix) :]))
        if source is None:
            return Origin(place)
        if len(path) > len(prefix):  # inside a dict that was named: where the dict was written
            return source
        return Origin(place, source.setting or via, source.value_place)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    plain = (str, int, float, bool, bytes, type(None))
    return type(a) is type(b) and isinstance(a, plain) and a == b


def _longest(path: KeyPath, written: dict[KeyPath, tuple[int, str | None]]) -> KeyPath | None:
    for length in range(len(path), 0, -1):
        if path[:length] in written:
            return path[:length]
    return None


def _written(
    statement: ast.stmt, values: dict[str, Any]
) -> Iterator[tuple[KeyPath, int, str | None]]:
    """(path, line, name it was read from) of what a statement's text says it sets."""
    if isinstance(statement, ast.Assign):
        for target in statement.targets:
            path = _path_of(target)
            if path is not None:
                yield from _expression(statement.value, path, statement.lineno)
    elif isinstance(statement, (ast.AnnAssign, ast.AugAssign)) and statement.value is not None:
        path = _path_of(statement.target)
        if path is not None:
            yield path, statement.lineno, None
            if isinstance(statement, ast.AnnAssign):
                yield from _expression(statement.value, path, statement.lineno)
    elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        yield from _call(statement.value, values)
    else:
        for inner in ast.iter_child_nodes(statement):
            if isinstance(inner, ast.stmt):
                yield from _written(inner, values)


def _call(call: ast.Call, values: dict[str, Any]) -> Iterator[tuple[KeyPath, int, str | None]]:
    """What ``x.update(...)`` and ``x.append(...)`` say they set."""
    if not isinstance(call.func, ast.Attribute):
        return
    path = _path_of(call.func.value)
    if path is None:
        return
    if call.func.attr in ("update", "merge"):
        for argument in call.args:
            yield from _expression(argument, path, call.lineno, inside_only=True)
        for keyword in call.keywords:
            if keyword.arg is not None:
                yield from _expression(keyword.value, (*path, keyword.arg), keyword.lineno)
    elif call.func.attr == "append" and call.args:
        held: Any = values
        for part in path:
            held = held[part] if isinstance(held, list) or part in held else ()
        yield from _expression(call.args[0], (*path, len(held) - 1), call.args[0].lineno)


def _expression(
    node: ast.expr, path: KeyPath, line: int, inside_only: bool = False
) -> Iterator[tuple[KeyPath, int, str | None]]:
    """The paths that a literal, ``dict(...)`` or list spells out, each with its line."""
    if not inside_only:
        yield path, line, node.id if isinstance(node, ast.Name) else None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        for keyword in node.keywords:
            if keyword.arg is not None:
                yield from _expression(keyword.value, (*path, keyword.arg), keyword.lineno)
    elif isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant):
                yield from _expression(value, (*path, key.value), key.lineno)
    elif isinstance(node, (ast.List, ast.Tuple)):
        for index, item in enumerate(node.elts):
            if isinstance(item, ast.Starred):
                return
            yield from _expression(item, (*path, index), item.lineno)


def _path_of(node: ast.expr) -> KeyPath | None:
    """('model', 'llm') for ``model.llm`` and ``model["llm"]``; None where it is computed."""
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, ast.Attribute):
        base = _path_of(node.value)
        return None if base is None else (*base, node.attr)
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        base = _path_of(node.value)
        return None if base is None else (*base, node.slice.value)
    return None
