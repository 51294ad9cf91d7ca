"""Parts from outside the package, in three ways.

* ``custom_imports = ["my_package.hooks"]`` in the config: modules that Python can import;
* ``--plugin my_file.py`` on the command line, or ``plugins = ["my_file.py"]`` in the config;
* the entry-point group ``xtuner_lite.plugins`` of an installed package.

A plug-in is first *declared*: its source is read for registrations, so that a config naming its
parts is checked without importing torch. :func:`load_plugins` then imports it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from xtuner_lite.discovery import (
    PLUGIN_ENTRIES,
    PLUGIN_FILES,
    find_module_file,
    index_package,
    index_source,
)

ENTRY_POINT_GROUP = "xtuner_lite.plugins"


class PluginError(ValueError):
    """A plug-in that cannot be found or imported."""

    exit_code = 2


@dataclass(frozen=True)
class Plugin:
    """A plug-in before it is imported."""

    module: str
    file: Path | None  # None for a module that Python finds by itself
    given_by: str  # where the user named it, for errors


def load_plugins(cfg: Any = None, extra_files: Iterable[str | Path] = ()) -> list[str]:
    """Import every plug-in of a config, the command line and the installed packages.

    Args:
        cfg: config whose ``custom_imports`` and ``plugins`` are read, or None. Its ``plugins``
            becomes the absolute paths of all files, so that a dumped config finds them again.
        extra_files: files of ``--plugin``, relative to the working folder.

    Returns:
        Names of the imported modules.

    Raises:
        PluginError: a file or module is missing, or fails while it is imported.
        KeyError: a name it registers is taken.
    """
    plugins = declare_plugins(cfg, extra_files)
    for plugin in plugins:
        _import(plugin)
    return [plugin.module for plugin in plugins]


def declare_plugins(cfg: Any = None, extra_files: Iterable[str | Path] = ()) -> list[Plugin]:
    """Make the names of the plug-ins known without importing them.

    A plug-in whose registrations are not all plain decorators is imported at once instead.

    Raises:
        PluginError: a file or module is missing, or is not Python.
    """
    plugins = [*_of_entry_points(), *_of_custom_imports(cfg), *_of_files(cfg, extra_files)]
    for plugin in plugins:
        if plugin.module not in PLUGIN_ENTRIES:
            _declare(plugin)
    files = [str(plugin.file) for plugin in plugins if plugin.file is not None]
    if cfg is not None and files:
        cfg["plugins"] = list(dict.fromkeys(files))
    return plugins


def module_name_of(file: Path) -> str:
    """The module name a plug-in file gets: unique per absolute path, so equal stems never clash."""
    digest = hashlib.sha256(str(file).encode()).hexdigest()[:8]
    return f"xtuner_lite_plugin_{re.sub(r'[^0-9A-Za-z_]', '_', file.stem)}_{digest}"


@cache
def _of_entry_points() -> tuple[Plugin, ...]:
    """Plug-ins of installed packages; looked up once, as it reads the metadata of every package."""
    found = entry_points(group=ENTRY_POINT_GROUP)
    return tuple(Plugin(point.module, None, f"entry point {point.name!r}") for point in found)


def _of_custom_imports(cfg: Any) -> list[Plugin]:
    value = (cfg or {}).get("custom_imports")
    if value is None:
        return []
    modules = value.get("imports", []) if isinstance(value, Mapping) else value
    modules = [modules] if isinstance(modules, str) else modules
    if not isinstance(modules, (list, tuple)) or not all(isinstance(m, str) for m in modules):
        raise PluginError(
            f"custom_imports must be a list of module names or dict(imports=[...]), got {value!r}"
        )
    return [Plugin(module, None, "custom_imports") for module in modules]


def _of_files(cfg: Any, extra_files: Iterable[str | Path]) -> list[Plugin]:
    listed = (cfg or {}).get("plugins") or []
    if isinstance(listed, (str, Path)):
        listed = [listed]
    config_file = getattr(cfg, "filename", None)
    folder = Path(config_file).parent if config_file else Path()
    candidates = [(folder / file, "plugins of the config") for file in listed]
    candidates += [(Path(file), "--plugin") for file in extra_files]
    plugins: dict[Path, Plugin] = {}
    for path, given_by in candidates:
        file = path.expanduser().resolve()
        if not file.is_file() or file.suffix != ".py":
            raise PluginError(
                f"{given_by}: {file} is not a Python file; give the path of a .py file "
                f"(a module is named in custom_imports)"
            )
        plugins[file] = Plugin(module_name_of(file), file, given_by)
    return list(plugins.values())


def _declare(plugin: Plugin) -> None:
    """Index a plug-in's registrations; import it when reading does not show them all."""
    if plugin.file is not None:
        PLUGIN_FILES[plugin.module] = plugin.file
        text = plugin.file.read_text(encoding="utf-8")
        try:
            entries = index_source(text, plugin.module, str(plugin.file))
        except (SyntaxError, ValueError) as error:
            raise PluginError(f"{plugin.given_by}: {plugin.file} is not valid: {error}") from error
        all_shown = _count_registrations(text) == len({entry.line for _, entry in entries})
    else:
        if find_module_file(plugin.module) == (None, []):
            raise PluginError(
                f"{plugin.given_by}: there is no module {plugin.module!r} in this Python's path; "
                f"install its package, set PYTHONPATH, or give the file with --plugin FILE.py"
            )
        entries = list(index_package(plugin.module))
        all_shown = bool(entries)
    PLUGIN_ENTRIES[plugin.module] = tuple(entries)
    if not all_shown:
        _import(plugin)


def _count_registrations(text: str) -> int:
    return sum(
        isinstance(node, ast.Attribute) and node.attr == "register_module"
        for node in ast.walk(ast.parse(text))
    )


def _import(plugin: Plugin) -> None:
    if plugin.module in sys.modules:
        return
    try:
        if plugin.file is None:
            import_module(plugin.module)
            return
        spec = importlib.util.spec_from_file_location(plugin.module, plugin.file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[plugin.module] = module
        spec.loader.exec_module(module)
    except ImportError as error:
        sys.modules.pop(plugin.module, None)
        raise PluginError(
            f"{plugin.given_by}: importing {plugin.file or plugin.module} failed: {error}; "
            f"install what it needs"
        ) from error
    except BaseException:
        sys.modules.pop(plugin.module, None)  # a half-imported module must not pass for a whole one
        raise


def import_declared(module: str) -> Any:
    """Import a module that holds a registered name: a plug-in file or an ordinary module."""
    if module in PLUGIN_FILES:
        _import(Plugin(module, PLUGIN_FILES[module], "plugins"))
        return sys.modules[module]
    return import_module(module)
