"""The documentation: python blocks run, commands of the how-tos run, links lead somewhere.

In a page, a python block whose first line is ``# file: NAME`` is written to that file; the others
are executed, in order, in one namespace. ``xtuner-lite`` lines of bash blocks in docs/howto are run
with a 2-layer model in place of the shipped one; what they train takes two optimizer steps. A
Chinese page with the very code of the English one is not run again.
"""

import ast
import re
import shlex
from pathlib import Path

import pytest

from tests.tiny import tiny_llama, tiny_tokenizer
from xtuner_lite import discovery
from xtuner_lite.cli.main import main
from xtuner_lite.registry import REGISTRIES

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
_TWIN = "_zh-CN"
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands_of(page: Path) -> list[list[str]]:
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def code_of(page: Path) -> list:
    """All that is run of a page, without comments and docstrings, and the files it writes."""
    found: list = [commands_of(page)]
    for block in blocks(page, "python"):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, _DOCUMENTED) and ast.get_docstring(node):
                node.body[0].value.value = ""
        file = block.splitlines()[0] if block.startswith("# file: ") else ""
        found.append((file, ast.dump(tree)))
    return found


def repeats_english(page: Path) -> bool:
    english = page.with_name(page.name.replace(_TWIN, ""))
    return english != page and english.exists() and code_of(english) == code_of(page)


#: How-tos with commands of ours; those about several machines or other programs have none.
HOWTOS = sorted(page for page in (ROOT / "docs/howto").glob("*.md") if blocks(page, "bash"))
OTHERS_WITH_PYTHON = [page for page in PAGES if page not in HOWTOS and blocks(page, "python")]


def run_python_blocks(page: Path) -> None:
    namespace: dict = {"__name__": "docs"}
    for block in blocks(page, "python"):
        first = block.splitlines()[0]
        if first.startswith("# file: "):
            Path(first.removeprefix("# file: ").strip()).write_text(block, encoding="utf-8")
        else:
            exec(compile(block, name_of(page), "exec"), namespace)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_model")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def plugins_forgotten():
    """Takes away afterwards what the pages' plug-ins registered."""
    yield
    for registry in REGISTRIES.values():
        for name, part in list(registry._module_dict.items()):
            if part.__module__.startswith("xtuner_lite_plugin_"):
                del registry._module_dict[name]
    discovery.PLUGIN_ENTRIES.clear()
    discovery.PLUGIN_FILES.clear()


def test_the_pages_are_there():
    assert len(PAGES) >= 20
    assert len(HOWTOS) >= 9
    assert len(OTHERS_WITH_PYTHON) >= 4


@pytest.mark.parametrize(
    "page", [p for p in OTHERS_WITH_PYTHON if not repeats_english(p)], ids=name_of
)
@pytest.mark.usefixtures("plugins_forgotten")
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_python_blocks(page)


@pytest.mark.parametrize("page", [p for p in HOWTOS if not repeats_english(p)], ids=name_of)
@pytest.mark.usefixtures("plugins_forgotten")
def test_a_howto_runs_from_top_to_bottom(page, tmp_path, monkeypatch, tiny_model):
    monkeypatch.chdir(tmp_path)
    run_python_blocks(page)
    commands = commands_of(page)
    assert ["xtuner-lite", "train"] in [words[:2] for words in commands]
    small = [f"model_path={tiny_model}", "max_length=640"]
    for program, *argv in commands:
        assert program == "xtuner-lite", argv
        if argv[0] in ("train", "check-data", "preview-data", "data"):
            argv += ["--cfg-options", *small, "train_cfg.max_epochs=None", "train_cfg.max_iters=2"]
        assert main(argv) == 0, argv
    assert list(tmp_path.glob("work_dirs/*/checkpoints/iter_2/*model.safetensors"))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{name_of(page)} links to {target}"
