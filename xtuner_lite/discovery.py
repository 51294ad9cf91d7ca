"""Finds what registries hold by reading source files, never by importing them.

``@HOOKS.register_module()`` above a class is all the registration there is. The index built here
maps each registered name to its module, so that a lookup imports one module and a listing none.
"""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

#: Module name -> file of the plug-ins given by path (see xtuner_lite.plugins).
PLUGIN_FILES: dict[str, Path] = {}
#: Module name -> registrations of the declared plug-ins, in the order they were declared.
PLUGIN_ENTRIES: dict[str, tuple[tuple[str, Entry], ...]] = {}


@dataclass(frozen=True)
class Entry:
    """One registered part, as its source file states it."""

    name: str
    module: str  # importable module that registers it
    qualname: str  # class or function in that module
    file: str
    line: int  # of the class or def statement
    description: str  # first line of its docstring, or ''

    @property
    def place(self) -> str:
        """'file:line', as editors and terminals make it clickable."""
        return f"{self.file}:{self.line}"


def find_module_file(module: str) -> tuple[Path | None, list[str]]:
    """Locate a module without importing it or its parents.

    Returns:
        (source file or None, folders of its submodules): (None, []) when there is no such module.
    """
    if module in PLUGIN_FILES:
        return PLUGIN_FILES[module], []
    parts = module.split(".")
    try:
        spec = importlib.util.find_spec(parts[0])
    except (ValueError, ImportError):  # a module put into sys.modules by hand has no spec
        return None, []
    for depth in range(1, len(parts)):
        if spec is None or spec.submodule_search_locations is None:
            return None, []
        name = ".".join(parts[: depth + 1])
        folders = [str(folder) for folder in spec.submodule_search_locations]
        spec = importlib.machinery.PathFinder.find_spec(name, folders)
    if spec is None:
        return None, []
    origin = spec.origin
    if origin == "frozen":  # a few modules of the standard library; their source lies beside them
        origin = getattr(spec.loader_state, "filename", None)
    file = Path(origin) if origin is not None and origin.endswith(".py") else None
    return file, [str(folder) for folder in spec.submodule_search_locations or []]


def walk_modules(root: str) -> Iterator[tuple[str, Path]]:
    """Yield (module name, file) of a module, or of a package and everything under it, sorted."""
    file, folders = find_module_file(root)
    if file is not None and not folders:
        yield root, file
    for folder in folders:
        base = Path(folder)
        for path in sorted(base.rglob("*.py")):
            relative = path.relative_to(base).with_suffix("")
            if not all(part.isidentifier() for part in relative.parts):
                continue
            names = [part for part in relative.parts if part != "__init__"]
            yield ".".join([root, *names]), path


@cache
def index_package(root: str) -> tuple[tuple[str, Entry], ...]:
    """(registry variable, entry) of every registration under a module or package, in file order."""
    found = []
    for module, path in walk_modules(root):
        text = path.read_text(encoding="utf-8")
        if "register_module" in text:
            found.extend(index_source(text, module, str(path)))
    return tuple(found)


def index_plugins() -> Iterator[tuple[str, Entry]]:
    """(registry variable, entry) of every registration in the declared plug-ins."""
    for entries in PLUGIN_ENTRIES.values():
        yield from entries


def index_source(text: str, module: str, file: str) -> list[tuple[str, Entry]]:
    """(registry variable, entry) of each top-level registration in one source text.

    Understood: ``@REG.register_module()``, with ``name="x"`` or ``name=["x", "y"]`` or the name as
    first argument, on a top-level class or function. ``registry.REG`` counts as ``REG``.
    """
    found = []
    for node in ast.parse(text, filename=file).body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            continue
        for decorator in node.decorator_list:
            registry = _registry_of(decorator)
            if registry is None:
                continue
            assert isinstance(decorator, ast.Call)
            for name in _names_of(decorator) or [node.name]:
                description = first_line(ast.get_docstring(node))
                entry = Entry(name, module, node.name, file, node.lineno, description)
                found.append((registry, entry))
    return found


def first_line(docstring: str | None) -> str:
    """First sentence of a docstring on one line, '' when there is none."""
    paragraph = (docstring or "").strip().partition("\n\n")[0]
    text = " ".join(paragraph.split())
    return text if text.find(". ") < 0 else text[: text.find(". ") + 1]


def documentation_of(entry: Entry) -> str:
    """The whole docstring of a registered part, read from its source; '' when it has none."""
    if not entry.line:
        return ""
    for node in ast.parse(Path(entry.file).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.lineno == entry.line:
            return ast.get_docstring(node) or ""
    return ""


def public_names(module: str) -> dict[str, str]:
    """Capitalised names that a package's ``__init__`` imports, each with its module, unimported."""
    file, _ = find_module_file(module)
    names: dict[str, str] = {}
    if file is None:
        return names
    is_package = file.name == "__init__.py"
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            base = module.split(".") if is_package else module.split(".")[:-1]
            base = base[: len(base) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                names[alias.asname or alias.name] = source
    return {name: source for name, source in names.items() if name[:1].isupper()}


def _registry_of(decorator: ast.expr) -> str | None:
    """'HOOKS' for ``HOOKS.register_module(...)`` and ``registry.HOOKS.register_module(...)``."""
    if not isinstance(decorator, ast.Call) or not isinstance(decorator.func, ast.Attribute):
        return None
    if decorator.func.attr != "register_module":
        return None
    owner = decorator.func.value
    if isinstance(owner, ast.Name):
        return owner.id
    return owner.attr if isinstance(owner, ast.Attribute) else None


def _names_of(call: ast.Call) -> list[str]:
    """Names given to ``register_module``; [] where it takes the name of what it decorates."""
    nodes = [keyword.value for keyword in call.keywords if keyword.arg == "name"] + call.args[:1]
    if not nodes:
        return []
    value = ast.literal_eval(nodes[0])
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)
