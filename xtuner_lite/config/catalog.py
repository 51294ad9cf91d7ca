"""The shipped configs: where they are, what they are called, and copies of them."""

from __future__ import annotations

import ast
import fnmatch
import shutil
from dataclasses import dataclass
from pathlib import Path

from xtuner_lite.config.errors import ConfigError, Problem
from xtuner_lite.discovery import first_line
from xtuner_lite.suggestions import did_you_mean

_PACKAGE_DIR = Path(__file__).resolve().parent.parent
SUFFIXES = (".py", ".yaml", ".yml", ".json")


@dataclass(frozen=True)
class ConfigInfo:
    """A shipped config."""

    name: str  # file name without .py
    description: str  # first line of its docstring, else of its first comment
    path: Path


def configs_dir() -> Path:
    """The folder of the shipped configs: in the package, or at the top of a source checkout.

    Raises:
        ConfigError: neither exists, so the installation is incomplete.
    """
    for folder in (_PACKAGE_DIR / "configs", _PACKAGE_DIR.parent / "configs"):
        if (folder / "_base_").is_dir():
            return folder
    raise ConfigError(
        Problem(
            "", f"the shipped configs are not at {_PACKAGE_DIR / 'configs'}; reinstall xtuner_lite"
        )
    )


def list_configs(pattern: str | None = None) -> list[ConfigInfo]:
    """The shipped configs whose name or folder fits, by name; parts that start with '_' are bases.

    Args:
        pattern: wildcards ('*qlora*') or a part of the name or folder ('llava'), in any case; None
            for all.
    """
    root = configs_dir()
    found = []
    for path in root.rglob("*.py"):
        if any(part.startswith("_") for part in path.relative_to(root).parts):
            continue
        if pattern is None or _fits(path.stem, pattern) or _fits(path.parent.name, pattern):
            found.append(ConfigInfo(path.stem, _description(path), path))
    return sorted(found, key=lambda info: info.name)


def find_config(path_or_name: str | Path) -> Path:
    """The file of a config given by path, or by the name of a shipped one.

    Raises:
        ConfigError: neither a file nor a shipped name, with the nearest names.
    """
    path = Path(path_or_name).expanduser()
    if path.is_file():
        return path.resolve()
    name = path.name.removesuffix(".py")
    shipped = {info.name: info.path for info in list_configs()}
    if len(path.parts) == 1 and name in shipped:
        return shipped[name]
    raise ConfigError(
        Problem(
            "",
            f"{str(path_or_name)!r} is neither a config file nor the name of a shipped config"
            f"{did_you_mean(name, shipped)} See: xtuner-lite list-cfg",
        )
    )


def copy_config(
    name: str | Path, target: str | Path, *, flatten: bool = False, force: bool = False
) -> Path:
    """Copy a config to edit it; the copy runs from any folder.

    Args:
        name: a shipped config's name, or the path of a config.
        target: a folder (the copy is called <name>_copy.py), or a path that ends in .py.
        flatten: write the whole resolved page instead, every setting in one file, no base.
        force: replace a file that is there.

    Returns:
        The file written.

    Raises:
        ConfigError: unknown name, or the file exists and ``force`` is not given.
    """
    source = find_config(name)
    destination = Path(target).expanduser()
    if destination.suffix != ".py":
        destination = destination / f"{source.stem}_copy.py"
    if destination.exists() and not force:
        raise ConfigError(
            Problem(
                "",
                f"{destination} exists and was left as it is; give another folder, or --force "
                f"to replace it",
            )
        )
    destination.parent.mkdir(parents=True, exist_ok=True)
    if flatten:
        from xtuner_lite.config.dump import dump_config
        from xtuner_lite.config.load import load_config

        dump_config(load_config(source), destination)
    elif source.suffix != ".py" or not _has_relative_base(source):
        shutil.copyfile(source, destination)
    else:
        raise ConfigError(
            Problem(
                "",
                f"{source} reads a base by `from .` or `from ..`, so a plain copy would not run "
                f"elsewhere; copy it with --flatten",
            )
        )
    return destination


def _fits(name: str, pattern: str) -> bool:
    wanted = pattern.lower()
    if not any(sign in wanted for sign in "*?["):
        wanted = f"*{wanted}*"
    return fnmatch.fnmatchcase(name.lower(), wanted)


def _description(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    try:
        described = first_line(ast.get_docstring(ast.parse(text)))
    except SyntaxError as error:
        return f"(does not parse: line {error.lineno})"
    if described:
        return described
    comments = (line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("#"))
    return next((line for line in comments if line), "")


def _has_relative_base(path: Path) -> bool:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return any(isinstance(node, ast.ImportFrom) and node.level > 0 for node in nodes)
