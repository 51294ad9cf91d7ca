"""What a dotted name stands for, re-exports and base classes followed, nothing imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from xtuner_lite.config.source import (
    Module,
    NotFound,
    Unknown,
    known_names,
    load_module,
    module_exists,
    submodules,
    top_level_names,
)

_MANY = 50  # `import *` lines read through without asking whether the name fits
_MAX_HOPS = 20  # re-exports followed before giving up: deeper is a cycle


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
        members = {member: node for _, member, node in top_level_names(owner.node.body)}
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
