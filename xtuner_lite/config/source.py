"""Follows names through source files without importing anything.

``peft.LoraConfig`` is found by reading ``peft/__init__.py``, then the file it re-exports from, and so
on; torch and transformers are never imported. What reading cannot tell is said to be unknown, never
guessed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from xtuner_lite.discovery import find_module_file

_MANY = 50  # `import *` lines read through without asking whether the name fits
_MAX_HOPS = 20  # re-exports followed before giving up: deeper is a cycle


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
        for rank, name, node in _top_level_names(self.tree.body):
            if rank >= ranks.get(name, 0):
                ranks[name], found[name] = rank, node
        return found

    @cached_property
    def star_imports(self) -> list[str]:
        """Modules whose public names this one takes over, by ``import *``."""
        nodes = [node for node in _statements(self.tree.body) if isinstance(node, ast.ImportFrom)]
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
        for node in _statements(self.tree.body):
            if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
                continue
            if node.targets[0].id == "_import_structure" and isinstance(node.value, ast.Dict):
                for key, value in zip(node.value.keys, node.value.values, strict=True):
                    if isinstance(key, ast.Constant) and isinstance(value, ast.List):
                        for item in value.elts:
                            if isinstance(item, ast.Constant):
                                found[item.value] = f"{self.name}.{key.value}"
        return found


@dataclass(frozen=True)
class Definition:
    """What a name stands for: a class, function, module or other value, and where."""

    module: Module
    node: ast.AST  # ClassDef, FunctionDef, the assigned expression, or the Module's tree
    name: str
    owner: ast.ClassDef | None = None  # the class a method was looked up on

    @property
    def place(self) -> str:
        return f"{self.module.file}:{getattr(self.node, 'lineno', 1)}"

    @property
    def is_class(self) -> bool:
        return isinstance(self.node, ast.ClassDef)

    @property
    def is_function(self) -> bool:
        return isinstance(self.node, (ast.FunctionDef, ast.AsyncFunctionDef))

    @property
    def is_module(self) -> bool:
        return isinstance(self.node, ast.Module)


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


def find(module: str, path: tuple[str, ...] = ()) -> Definition:
    """What ``module.path[0].path[1]...`` stands for.

    Raises:
        NotFound: there is no such module or name.
        Unknown: the source does not tell.
    """
    return _find(module, path, _MAX_HOPS)


def _find(module: str, path: tuple[str, ...], hops: int) -> Definition:
    if hops == 0:
        raise Unknown(f"{module}: the re-exports of {path} go in circles")
    source = load_module(module)
    if source is None:
        if not module_exists(module):
            raise _missing_module(module)
        raise Unknown(f"{module} has no readable source")
    if not path:
        return Definition(source, source.tree, module)
    found = _member(source, path[0], hops)
    for name in path[1:]:
        found = _attribute(found, name, hops)
    return found


def _missing_module(module: str) -> LookupError:
    """NotFound for a module without file, Unknown when a parent may make it at run time."""
    parts = module.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        parent = load_module(".".join(parts[:depth]))
        if parent is not None:
            if parent.is_dynamic:
                return Unknown(f"{parent.name} may make {module} at run time")
            return NotFound(parent.name, parts[depth], submodules(parent))
    return NotFound(parts[0], "", [])


def submodules(source: Module) -> list[str]:
    """Names of the modules in a package's folders."""
    names: list[str] = []
    for folder in source.folders:
        for path in sorted(Path(folder).iterdir()):
            if path.suffix == ".py" or (path / "__init__.py").is_file():
                names.append(path.stem)
    return [name for name in names if name.isidentifier() and not name.startswith("_")]


def _member(source: Module, name: str, hops: int) -> Definition:
    """What a top-level name of a module stands for, re-exports followed."""
    node = source.members.get(name) if _mentions(source, name) else None
    if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return Definition(source, node, name)
    if isinstance(node, ast.ImportFrom):
        original = next(a.name for a in node.names if (a.asname or a.name) == name)
        target = source.absolute(node)
        if (target, original) == (source.name, name):  # "from torch import optim" in torch/__init__
            return _find(f"{target}.{original}", (), hops - 1)
        try:
            return _find(target, (original,), hops - 1)
        except NotFound:
            return _find(f"{target}.{original}", (), hops - 1)
    if isinstance(node, ast.Import):
        alias = next(a for a in node.names if (a.asname or a.name.split(".")[0]) == name)
        return _find(alias.name if alias.asname else name, (), hops - 1)
    if isinstance(node, (ast.Name, ast.Attribute)) and not _names(node, name):
        return resolve_expression(source, node, hops - 1)
    if node is not None:
        return Definition(source, node, name)
    return _indirect_member(source, name, hops)


def _indirect_member(source: Module, name: str, hops: int) -> Definition:
    """A name that a module gets by ``import *``, lazily, or because it is a submodule."""
    unsure = source.is_dynamic
    targets = sorted(source.star_imports, key=lambda target: not _sounds_like(target, name))
    if len(targets) > _MANY:  # transformers.models: reading hundreds of packages takes seconds
        targets = [target for target in targets if _sounds_like(target, name)]
        unsure = True
    for target in targets:
        other = load_module(target)
        if other is None or not _mentions(other, name, and_stars=True):
            unsure = unsure or other is None
            continue
        try:
            return _find(target, (name,), hops - 1)
        except NotFound:
            continue
        except Unknown:
            unsure = True
    lazy = source.lazy_structure() if "_import_structure" in source.text else {}
    if name in lazy:
        return _find(lazy[name], (name,), hops - 1)
    if source.is_package and module_exists(f"{source.name}.{name}"):
        return _find(f"{source.name}.{name}", (), hops - 1)
    if unsure:
        raise Unknown(f"{source.name} makes its names at run time; {name!r} is not in its source")
    raise NotFound(source.name, name, known_names(source) + list(lazy))


def _sounds_like(module: str, name: str) -> bool:
    """'transformers.models.llama' sounds like 'LlamaConfig': saves reading 400 other packages."""
    return module.rpartition(".")[2].replace("_", "") in name.lower()


def known_names(source: Module) -> list[str]:
    """Public top-level names of a module, those of its ``import *`` included."""
    names = [name for name in source.members if not name.startswith("_")]
    for target in source.star_imports:
        other = load_module(target)
        if other is not None and other.name != source.name:
            names += [name for name in other.members if not name.startswith("_")]
    return names


def _mentions(source: Module, name: str, and_stars: bool = False) -> bool:
    """Cheap test before parsing a large file: is the word in it, or can it come from elsewhere?"""
    if name in source.text:
        return True
    return and_stars and ("import *" in source.text or source.is_dynamic)


def _names(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _attribute(found: Definition, name: str, hops: int) -> Definition:
    """``found.name``: a member of a module, or a method or attribute of a class."""
    if found.is_module:
        return _find(found.module.name, (name,), hops - 1)
    if not found.is_class:
        raise Unknown(f"{found.name}.{name}: only importing tells what {found.name} is")
    known: list[str] = []
    for owner in linearize(found):
        assert isinstance(owner.node, ast.ClassDef)
        members = dict((member, node) for _, member, node in _top_level_names(owner.node.body))
        known += members
        if name in members:
            return Definition(owner.module, members[name], f"{found.name}.{name}", owner.node)
    raise NotFound(found.name, name, known)


def resolve_expression(source: Module, node: ast.AST, hops: int = _MAX_HOPS) -> Definition:
    """What a dotted name written in a module stands for there.

    Raises:
        NotFound, Unknown: as :func:`find`; builtins and local names are unknown.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        node = ast.parse(node.value, mode="eval").body
    if isinstance(node, ast.Subscript):
        return resolve_expression(source, node.value, hops)
    if isinstance(node, ast.Name):
        if node.id in source.members or source.star_imports:
            return _member(source, node.id, hops)
        raise Unknown(f"{node.id!r} is not a name of {source.name}")
    if isinstance(node, ast.Attribute):
        return _attribute(resolve_expression(source, node.value, hops), node.attr, hops)
    raise Unknown(f"{ast.unparse(node)!r} is computed")


@cache
def linearize(found: Definition) -> tuple[Definition, ...]:
    """The classes that attributes are looked up on, in Python's order (C3), ``object`` left out.

    Raises:
        Unknown: a base class has no readable source, or a metaclass makes the class.
    """
    node = found.node
    assert isinstance(node, ast.ClassDef)
    for keyword in node.keywords:
        if keyword.arg == "metaclass" and not ast.unparse(keyword.value).endswith("ABCMeta"):
            raise Unknown(f"{found.name} is made by a metaclass")
    bases = []
    for base in node.bases:
        text = ast.unparse(base)
        if text.split("[")[0].split(".")[-1] in ("object", "ABC", "Generic", "Protocol"):
            continue
        try:
            parent = resolve_expression(found.module, base)
        except NotFound as error:
            raise Unknown(str(error)) from error
        if not parent.is_class:
            raise Unknown(f"base {text} of {found.name} is computed")
        bases.append(parent)
    return (found, *_merge([list(linearize(base)) for base in bases] + [bases]))


def _merge(chains: list[list[Definition]]) -> Iterator[Definition]:
    """C3 merge: each class before its bases, bases in the order they were written."""
    chains = [list(chain) for chain in chains if chain]
    while chains:
        for chain in chains:
            head = chain[0]
            if not any(_position(head, other) > 0 for other in chains):
                break
        else:
            raise Unknown("the base classes contradict each other")
        yield head
        chains = [[item for item in chain if not _same(item, head)] for chain in chains]
        chains = [chain for chain in chains if chain]


def _same(a: Definition, b: Definition) -> bool:
    return a.node is b.node


def _position(item: Definition, chain: list[Definition]) -> int:
    return next((i for i, other in enumerate(chain) if _same(item, other)), -1)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements a module runs at its top level, those inside if, try and with included."""
    for node in body:
        yield node
        for field in ("body", "orelse", "finalbody"):
            if isinstance(node, (ast.If, ast.Try, ast.With)):
                yield from _statements(getattr(node, field, []))
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                yield from _statements(handler.body)


def _top_level_names(body: list[ast.stmt]) -> Iterator[tuple[int, str, ast.AST]]:
    """(rank, name, node) of what a body defines: 3 class or function, 2 import, 1 assignment."""
    for node in _statements(body):
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
