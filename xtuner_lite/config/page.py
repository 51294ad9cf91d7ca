"""Runs one Python config page: statement by statement, imports kept lazy, bases read first.

A page is ordinary Python with two changes: an import outside the standard library gives a lazy
object (nothing is imported), and ``with read_base():`` takes over the names of other pages.
"""

from __future__ import annotations

import ast
import copy
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any

from mmengine.config import ConfigDict
from mmengine.config.lazy import LazyAttr, LazyObject

from xtuner_lite.config.catalog import configs_dir
from xtuner_lite.config.errors import ConfigError, Problem
from xtuner_lite.config.lazy_imports import LAZY, LazyImports
from xtuner_lite.config.options import set_path
from xtuner_lite.config.origins import (
    COMMAND_LINE,
    KeyPath,
    LazyImport,
    Origin,
    OriginTracker,
)
from xtuner_lite.discovery import find_module_file
from xtuner_lite.suggestions import did_you_mean

#: ``__module__`` of what a page itself defines.
PAGE_MODULE = "xtuner_lite_config_page"


class PageDict(ConfigDict):
    """mmengine's config dict while a page is read: lazy stays lazy, a wrong key names its like."""

    lazy = True

    def __missing__(self, name: Any) -> Any:
        raise KeyError(f"no key {name!r}{did_you_mean(str(name), map(str, dict.keys(self)))}")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            known = did_you_mean(name, map(str, dict.keys(self)))
            raise AttributeError(f"no key {name!r}{known}") from None


@dataclass
class Page:
    """What a page defines."""

    file: Path
    values: dict[str, Any] = field(default_factory=dict)  # data names, in order
    imported: dict[str, Any] = field(default_factory=dict)  # lazy objects, modules, functions
    origins: dict[tuple[Any, ...], Origin] = field(default_factory=dict)
    imports: list[LazyImport] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    unread: dict[str, int] = field(default_factory=dict)  # names no later line reads -> line
    from_base: set[str] = field(default_factory=set)  # names that a base defines too
    overridden: set[str] = field(default_factory=set)  # settings of the command line found here


def run_page(file: Path, overrides: Overrides | None = None, stack: tuple[Path, ...] = ()) -> Page:
    """Run a page and its bases.

    Args:
        file: the page.
        overrides: settings of the command line; they replace assignments, wherever they are.
        stack: pages being read, to find a base that reads itself.

    Raises:
        ConfigError: the page does not parse or run, or a base is missing, with file and line.
    """
    file = file.resolve()
    if file in stack:
        chain = " -> ".join(str(item) for item in (*stack, file))
        raise ConfigError(
            Problem("", f"config pages read each other in a circle: {chain}", str(file))
        )
    try:
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text, filename=str(file))
    except (SyntaxError, UnicodeDecodeError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise ConfigError(Problem("", f"is not valid Python: {error}", f"{file}:{line}")) from error
    return _PageRun(file, tree, overrides or Overrides(), (*stack, file)).run()


@dataclass
class Overrides:
    """What the command line changes while pages run, to reach what is computed from it."""

    plain: dict[str, Any] = field(default_factory=dict)  # name -> value of its assignments
    nested: dict[str, list[tuple[KeyPath, Any]]] = field(
        default_factory=dict
    )  # name -> paths below it


class _PageRun:
    """The state of one page while it runs."""

    def __init__(
        self, file: Path, tree: ast.Module, overrides: Overrides, stack: tuple[Path, ...]
    ) -> None:
        self.page = Page(file, files=[str(file)])
        self.tree = tree
        self.overrides = overrides
        self.stack = stack
        self.tracker = OriginTracker(str(file))
        self.namespace: dict[str, Any] = {
            "__file__": str(file),
            "__name__": PAGE_MODULE,
            LAZY: self._lazy_import,
        }
        self.packages: dict[
            str, list[str]
        ] = {}  # 'torch' -> ['torch', 'torch.nn'] of plain imports
        self.converted: dict[int, tuple[Any, Any]] = {}

    def run(self) -> Page:
        for statement in self.tree.body:
            if isinstance(statement, ast.With):
                self._read_bases(statement)
            elif not _is_config_import(statement):
                self._run_statement(statement)
                self._collect()
                self.tracker.record(statement, self.page.values)
                self._mark_overridden(statement)
        page = self.page
        page.origins = self.tracker.origins
        page.unread.update(_unread_names(self.tree))
        page.unread = {
            name: line for name, line in page.unread.items() if not _is_read(self.tree, name, line)
        }
        return page

    # ------------------------------------------------------------------ statements

    def _run_statement(self, statement: ast.stmt) -> None:
        names = _assigned_names(statement)
        replaced = [name for name in names if name in self.overrides.plain]
        if replaced and len(names) == len(replaced):
            for name in replaced:
                self.namespace[name] = copy.deepcopy(self.overrides.plain[name])
            return
        code = ast.Module(body=[copy.deepcopy(statement)], type_ignores=[])
        code = LazyImports().visit(code)
        ast.fix_missing_locations(code)
        try:
            exec(compile(code, str(self.page.file), "exec", dont_inherit=True), self.namespace)
        except Exception as error:
            raise self._failure(statement, error) from error
        for name in replaced:
            self.namespace[name] = copy.deepcopy(self.overrides.plain[name])

    def _failure(self, statement: ast.stmt, error: Exception) -> ConfigError:
        """The error of a line of the page, told with that line and the nearest right name."""
        line = statement.lineno
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename == str(self.page.file) and frame.lineno:
                line = frame.lineno
        text = f"{type(error).__name__}: {error.args[0] if error.args else error}"
        if isinstance(error, NameError) and error.name:
            text += did_you_mean(error.name, [*self.page.values, *self.page.imported])
        elif isinstance(error, RuntimeError) and not error.args:  # mmengine's LazyObject called
            text = (
                "an imported class or function is called while the config is read; imports stay "
                "lazy, so write dict(type=Name, ...) instead of Name(...)"
            )
        return ConfigError(Problem("", text, f"{self.page.file}:{line}"))

    def _lazy_import(self, module: str, name: str | None, line: int, top: bool) -> LazyObject:
        """The lazy object of an import; ``top`` for ``import a.b``, which binds ``a``."""
        self.page.imports.append(LazyImport(module, name, f"{self.page.file}:{line}"))
        location = f"{self.page.file}, line {line}"
        if not top:
            return LazyObject(module, name, location)
        modules = self.packages.setdefault(module.split(".")[0], [])
        modules.append(module)
        return LazyObject(list(modules), None, location)

    def _collect(self) -> None:
        """Sort the namespace into data and imports; make dicts PageDicts, identity kept."""
        for name, value in list(self.namespace.items()):
            if name.startswith("__"):
                continue
            if _is_import(value):
                self.page.imported[name] = value
                self.page.values.pop(name, None)
                continue
            value = self._convert(value)
            self.namespace[name] = self.page.values[name] = value
            self.page.imported.pop(name, None)
        for name in [name for name in self.page.values if name not in self.namespace]:
            del self.page.values[name]

    def _convert(self, value: Any) -> Any:
        """Dicts as PageDicts, in place where Python's own sharing could be seen."""
        if id(value) in self.converted:
            return self.converted[id(value)][1]
        if isinstance(value, dict):
            result = value if isinstance(value, PageDict) else PageDict()
            self.converted[id(value)] = (value, result)
            for key, item in list(dict.items(value)):
                dict.__setitem__(result, key, self._convert(item))
            if result is value:
                del self.converted[id(value)]
            return result
        if isinstance(value, list):
            self.converted[id(value)] = (value, value)
            value[:] = [self._convert(item) for item in value]
            del self.converted[id(value)]
        elif type(value) is tuple:
            items = tuple(self._convert(item) for item in value)
            return value if all(a is b for a, b in zip(items, value, strict=True)) else items
        return value

    def _mark_overridden(self, statement: ast.stmt) -> None:
        for name in _assigned_names(statement):
            if name in self.overrides.plain:
                self.page.overridden.add(name)
                self.tracker.set((name,), self.page.values.get(name), COMMAND_LINE)
            for path, value in self.overrides.nested.get(name, ()):
                self.page.overridden.add(name)
                set_path(self.page.values, path, copy.deepcopy(value))
                self.tracker.set(path, value, COMMAND_LINE)

    # ------------------------------------------------------------------ bases

    def _read_bases(self, statement: ast.With) -> None:
        place = f"{self.page.file}:{statement.lineno}"
        call = statement.items[0].context_expr
        if ast.unparse(call).split(".")[-1] != "read_base()" or len(statement.items) > 1:
            raise ConfigError(
                Problem("", "only `with read_base():` can be used in a config", place)
            )
        for item in statement.body:
            if not isinstance(item, ast.ImportFrom) or item.module is None:
                text = "under `with read_base():` only `from module import names` can stand"
                raise ConfigError(Problem("", text, f"{self.page.file}:{item.lineno}"))
            self._read_base(item)
        self._collect()

    def _read_base(self, node: ast.ImportFrom) -> None:
        place = f"{self.page.file}:{node.lineno}"
        base = run_page(_base_file(node, self.page.file, place), self.overrides, self.stack)
        page = self.page
        page.files += [file for file in base.files if file not in page.files]
        page.imports += base.imports
        page.overridden |= base.overridden
        for alias in node.names:
            known = {**base.imported, **base.values}
            if alias.name == "*":
                for name in known:
                    self._adopt(base, name, name)
            elif alias.name in known:
                self._adopt(base, alias.name, alias.asname or alias.name)
            else:
                text = f"{base.file} defines no {alias.name!r}{did_you_mean(alias.name, known)}"
                raise ConfigError(Problem("", text, place))
        # A name that a base defines for its leaves is read by them, or by nobody.
        page.unread.update({name: 0 for name in base.unread if name in self.namespace})

    def _adopt(self, base: Page, original: str, name: str) -> None:
        if original in base.imported:
            self.namespace[name] = base.imported[original]
            return
        self.namespace[name] = base.values[original]
        self.page.from_base.add(name)
        self.tracker.adopt(name, base.values[original], original, base.origins)


def _base_file(node: ast.ImportFrom, page: Path, place: str) -> Path:
    """The file that ``from module import ...`` means under ``read_base``."""
    assert node.module is not None
    parts = node.module.split(".")
    if node.level:
        folder = page.parent
        for _ in range(node.level - 1):
            folder = folder.parent
        file = folder.joinpath(*parts).with_suffix(".py")
    elif parts[:2] == ["xtuner_lite", "configs"] and len(parts) > 2:
        file = configs_dir().joinpath(*parts[2:]).with_suffix(".py")
    else:
        found, _ = find_module_file(node.module)
        if found is None:
            text = f"there is no base config {node.module!r} in this Python's path; set PYTHONPATH"
            raise ConfigError(Problem("", text, place))
        return found
    if not file.is_file():
        siblings = [path.stem for path in file.parent.glob("*.py")] if file.parent.is_dir() else []
        text = f"there is no base config {file}{did_you_mean(file.stem, siblings)}"
        raise ConfigError(Problem("", text, place))
    return file


def _is_config_import(statement: ast.stmt) -> bool:
    """``from mmengine.config import read_base`` only marks the syntax."""
    return isinstance(statement, ast.ImportFrom) and any(
        alias.name == "read_base" for alias in statement.names
    )


def _is_import(value: Any) -> bool:
    if isinstance(value, (LazyObject, LazyAttr, FunctionType, type)):
        return True
    return type(value).__name__ in ("module", "builtin_function_or_method", "_Feature")


def _assigned_names(statement: ast.stmt) -> list[str]:
    """Plain names that a simple assignment binds."""
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, (ast.AnnAssign, ast.AugAssign)) and statement.value is not None:
        targets = [statement.target]
    names: list[str] = []
    for target in targets:
        items = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
        names += [item.id for item in items if isinstance(item, ast.Name)]
    return names


def _unread_names(tree: ast.Module) -> dict[str, int]:
    """Names assigned at the top level, with the line of their last assignment."""
    return {
        name: statement.lineno
        for statement in tree.body
        for name in _assigned_names(statement)
        if not name.startswith("_")
    }


def _is_read(tree: ast.Module, name: str, line: int) -> bool:
    """Whether a statement below ``line``, or a function anywhere, reads the name."""
    return any(
        isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load)
        for statement in tree.body
        if statement.lineno > line or isinstance(statement, ast.FunctionDef)
        for node in ast.walk(statement)
    )
