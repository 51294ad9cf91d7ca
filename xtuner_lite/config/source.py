"""Source files of modules, read and parsed without importing anything.

``peft.LoraConfig`` is found by reading ``peft/__init__.py``, then the file it re-exports from, and
so on (see :mod:`xtuner_lite.config.names`); torch and transformers are never imported. What reading
cannot tell is said to be unknown, never guessed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from xtuner_lite.discovery import find_module_file


class NotFound(LookupError):
    """A name that certainly does not exist, with the names that do."""

    def __init__(self, module: str, name: str, known: list[str]) -> None:
        text = f"{module} has no {name!r}" if name else f"there is no module {module!r}"
        super().__init__(text)
        self.module, self.name, self.known = module, name, known


class Unknown(LookupError):
    """A name about which the source does not say enough; only importing would tell."""


@dataclass(frozen=True)
class Module:
    """A source file, parsed on demand."""

    name: str
    file: Path
    is_package: bool
    folders: tuple[str, ...]

    @cached_property
    def text(self) -> str:
        return self.file.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=str(self.file))

    @cached_property
    def members(self) -> dict[str, ast.AST]:
        """Top-level name -> ClassDef, FunctionDef, alias's import statement, or assigned value.

        A class or function wins over an import of the same name, an import over an assignment:
        ``X = wrap(X)`` below ``class X`` still describes X.
        """
        ranks: dict[str, int] = {}
        found: dict[str, ast.AST] = {}
        for rank, name, node in top_level_names(self.tree.body):
            if rank >= ranks.get(name, 0):
                ranks[name], found[name] = rank, node
        return found

    @cached_property
    def star_imports(self) -> list[str]:
        """Modules whose public names this one takes over, by ``import *``."""
        nodes = [node for node in statements(self.tree.body) if isinstance(node, ast.ImportFrom)]
        return [
            self.absolute(node) for node in nodes if any(alias.name == "*" for alias in node.names)
        ]

    @cached_property
    def is_dynamic(self) -> bool:
        """Whether names appear at run time that no statement shows."""
        return bool(
            re.search(
                r"sys\.modules\[__name__\]|globals\(\)|^def __getattr__|^    def __getattr__\(name",
                self.text,
                re.M,
            )  # fmt: skip
        )

    def absolute(self, node: ast.ImportFrom) -> str:
        """The absolute name of the module that an import statement of this file reads."""
        if not node.level:
            return node.module or ""
        base = self.name.split(".") if self.is_package else self.name.split(".")[:-1]
        base = base[: len(base) - node.level + 1]
        return ".".join([*base, *([node.module] if node.module else [])])

    def lazy_structure(self) -> dict[str, str]:
        """Name -> submodule of an ``_import_structure`` dict (transformers' lazy modules)."""
        found: dict[str, str] = {}
        for node in statements(self.tree.body):
            if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
                continue
            if node.targets[0].id == "_import_structure" and isinstance(node.value, ast.Dict):
                for key, value in zip(node.value.keys, node.value.values, strict=True):
                    if isinstance(key, ast.Constant) and isinstance(value, ast.List):
                        for item in value.elts:
                            if isinstance(item, ast.Constant):
                                found[item.value] = f"{self.name}.{key.value}"
        return found


@cache
def load_module(name: str) -> Module | None:
    """The source of a module (a stub for one written in C), or None when there is no such file."""
    file, folders = find_module_file(name)
    if file is None:
        file = _stub_of(name)
    if file is None:
        return None
    return Module(name, file, file.stem == "__init__", tuple(folders))


def module_exists(name: str) -> bool:
    """Whether a module of this name could be imported, as far as files tell."""
    file, folders = find_module_file(name)
    return file is not None or bool(folders) or _spec_exists(name)


def _spec_exists(name: str) -> bool:
    from importlib.machinery import PathFinder
    from importlib.util import find_spec

    parent, _, _ = name.rpartition(".")
    if not parent:
        try:
            return find_spec(name) is not None
        except ValueError:  # in sys.modules without a spec
            return True
    _, folders = find_module_file(parent)
    return PathFinder.find_spec(name, folders) is not None


def _stub_of(name: str) -> Path | None:
    """The .pyi beside a module written in C."""
    parent, _, last = name.rpartition(".")
    for folder in find_module_file(parent)[1] if parent else []:
        for candidate in (Path(folder) / last / "__init__.pyi", Path(folder) / f"{last}.pyi"):
            if candidate.is_file():
                return candidate
    return None


def submodules(source: Module) -> list[str]:
    """Names of the modules in a package's folders."""
    names: list[str] = []
    for folder in source.folders:
        for path in sorted(Path(folder).iterdir()):
            if path.suffix == ".py" or (path / "__init__.py").is_file():
                names.append(path.stem)
    return [name for name in names if name.isidentifier() and not name.startswith("_")]


def known_names(source: Module) -> list[str]:
    """Public top-level names of a module, those of its ``import *`` included."""
    names = [name for name in source.members if not name.startswith("_")]
    for target in source.star_imports:
        other = load_module(target)
        if other is not None and other.name != source.name:
            names += [name for name in other.members if not name.startswith("_")]
    return names


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements a module runs at its top level, those inside if, try and with included."""
    for node in body:
        yield node
        for field in ("body", "orelse", "finalbody"):
            if isinstance(node, (ast.If, ast.Try, ast.With)):
                yield from statements(getattr(node, field, []))
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                yield from statements(handler.body)


def top_level_names(body: list[ast.stmt]) -> Iterator[tuple[int, str, ast.AST]]:
    """(rank, name, node) of what a body defines: 3 class or function, 2 import, 1 assignment."""
    for node in statements(body):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield 3, node.name, node
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if alias.name != "*":
                    yield 2, alias.asname or alias.name, node
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield 2, alias.asname or alias.name.split(".")[0], node
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                names = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
                for name in names:
                    if isinstance(name, ast.Name):
                        yield 1, name.id, node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield 1, node.target.id, node.value or node.annotation
