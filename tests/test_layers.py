"""Which part may import which: the table of the architecture, checked on every file."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "xtuner_lite"

#: Part -> layer. A module imports only from lower layers or its own part; parts of one layer do not
#: import each other.
LAYERS = {
    "version": 0, "home": 0, "structures": 0, "suggestions": 0, "discovery": 0, "plugins": 0,
    "processes": 0,
    "registry_base": 0, "registry": 0,
    "config": 1,
    "templates": 2,
    "images": 2.5,
    "data": 3, "models": 3,
    "methods": 4, "engine": 4,
    "runner": 5,
    "export": 6, "chat": 6, "report": 6,
    "cli": 7,
}  # fmt: skip


def imports_of(path: Path, package: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of a file, those inside functions and TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "." * node.level
            else:
                assert node.module is not None
                for alias in node.names:
                    yield node.lineno, f"{node.module}.{alias.name}"


def test_every_import_goes_down():
    offending = []
    files = sorted(path for path in PACKAGE.rglob("*.py") if "configs" not in path.parts)
    assert len(files) > 60
    for path in files:
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        own = parts[0]
        if own == "__init__":
            continue
        assert own in LAYERS, f"{path}: {own} has no layer; add it to LAYERS"
        for line, module in imports_of(path, own):
            place = f"{path.relative_to(PACKAGE.parent)}:{line}"
            if module.startswith("."):
                offending.append(f"{place} imports relatively; write the absolute name")
                continue
            names = module.split(".")
            if names[0] != "xtuner_lite" or len(names) < 2:
                continue
            other = names[1]
            if other not in LAYERS or other == own:  # a public name of xtuner_lite itself
                continue
            both_base = LAYERS[own] == LAYERS[other] == 0  # single files, kept acyclic below
            if LAYERS[other] >= LAYERS[own] and not both_base:
                offending.append(
                    f"{place} ({own}, layer {LAYERS[own]}) imports {module} "
                    f"({other}, layer {LAYERS[other]})"
                )
    assert offending == [], "\n".join(offending)


def test_base_modules_have_no_cycle():
    """Layer 0 is single files: each imports only those before it in LAYERS."""
    order = [name for name, layer in LAYERS.items() if layer == 0]
    for name in order:
        for line, module in imports_of(PACKAGE / f"{name}.py", name):
            names = module.split(".")
            if names[0] == "xtuner_lite" and len(names) > 1 and names[1] in order:
                assert order.index(names[1]) < order.index(name), (
                    f"{name}.py:{line} imports {module}"
                )


@pytest.mark.parametrize(
    "module",
    ["xtuner_lite", "xtuner_lite.config", "xtuner_lite.registry", "xtuner_lite.structures",
     "xtuner_lite.cli.main", "xtuner_lite.plugins", "xtuner_lite.engine.hooks"],
)  # fmt: skip
def test_import_is_free_of_torch(module):
    code = (
        f"import sys, {module}\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_command_is_light_to_import():
    names = [path.stem for path in (PACKAGE / "cli").glob("*.py") if path.stem != "__init__"]
    assert len(names) >= 5
    imports = "; ".join(f"import xtuner_lite.cli.{name}" for name in names)
    code = f"import sys; {imports}\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
