"""The command line: help without torch, commands by file, exit codes."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from xtuner_lite.cli import main as cli
from xtuner_lite.config import ConfigError, Problem

COMMANDS = cli.find_commands()


def test_commands_are_the_modules_beside_main():
    assert {"train", "list-cfg", "copy-cfg", "list", "make-identity", "chat"} <= set(COMMANDS)
    assert all(command.help for command in COMMANDS.values())
    assert "main" not in COMMANDS


@pytest.mark.parametrize(
    "words", [["--help"], ["list-cfg"], ["--version"], *[[name, "--help"] for name in COMMANDS]]
)
def test_light_commands_import_no_torch(words):
    code = (
        "import sys; from xtuner_lite.cli.main import main\n"
        f"try:\n    code = main({words!r})\nexcept SystemExit as stop:\n    code = stop.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'"),
        (["zzz"], "unknown command 'zzz'; See: xtuner-lite --help"),
    ],
)
def test_unknown_command(words, message, capsys):
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err


def test_no_command_prints_help(capsys):
    assert cli.main([]) == 2
    assert "COMMAND" in capsys.readouterr().out


class Refused(KeyError):
    exit_code = 3


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (
            ConfigError(Problem("model.lora", "wrong", "a.py:3")),
            2,
            "error: a.py:3: model.lora: wrong\n",
        ),
        (Refused("no quotes around me"), 3, "error: no quotes around me\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_users_mistakes_are_short(monkeypatch, capsys, error, code, text):
    from xtuner_lite.cli import list_cfg

    def fail(args):
        raise error

    monkeypatch.setattr(list_cfg, "run", fail)
    assert cli.main(["list-cfg"]) == code
    assert capsys.readouterr().err == text


def test_other_errors_keep_their_traceback(monkeypatch, capsys):
    from xtuner_lite.cli import list_cfg

    monkeypatch.setattr(list_cfg, "run", lambda args: 1 / 0)
    assert cli.main(["list-cfg"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_traceback_on_demand(monkeypatch, capsys):
    monkeypatch.setenv("XTUNER_LITE_TRACEBACK", "1")
    assert cli.main(["copy-cfg", "nothing_like_it"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_tools_are_thin_doors():
    """Each file of tools/ only hands its words to a command."""
    folder = Path(__file__).resolve().parents[2] / "tools"
    files = sorted(folder.glob("*.py"))
    assert len(files) >= 4
    for file in files:
        tree = ast.parse(file.read_text())
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        names = [ast.unparse(call.func) for call in calls]
        assert "main" in names, file
        assert not any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in tree.body), (
            file
        )


def test_module_runs():
    done = subprocess.run(
        [sys.executable, "-m", "xtuner_lite.cli.main", "--version"], capture_output=True, text=True
    )
    assert done.stdout.startswith("xtuner_lite ")
