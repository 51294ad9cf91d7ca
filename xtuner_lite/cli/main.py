"""The ``xtuner-lite`` command. Each module beside this one is a subcommand.

A subcommand module has ``HELP`` (one line, a literal), ``add_arguments(parser)`` and
``run(args) -> int`` (the exit code). It is called like its file ('make_identity' is make-identity)
unless it has ``NAME``; ``ALIAS`` is a second name, the one users of XTuner know. These three are
read from its source, so that ``--help`` imports no command; heavy imports belong inside ``run``.

Exit codes: 0 done, 2 a mistake of the user's (told without traceback), 1 any other error (with its
traceback), 130 interrupted. An exception says that it is a user's mistake by an ``exit_code``
attribute. XTUNER_LITE_TRACEBACK=1 shows the traceback always.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from xtuner_lite.suggestions import did_you_mean
from xtuner_lite.version import __version__

_PACKAGE = Path(__file__).resolve().parents[1]
_PROG = "xtuner-lite"


@dataclass(frozen=True)
class Command:
    """A subcommand before it is imported."""

    name: str
    module: str
    help: str


def find_commands() -> dict[str, Command]:
    """Name -> command, for every module of this folder that has ``run``."""
    commands = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem in ("__init__", "main") or path.stem.startswith("_"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        texts = {
            target.id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        if any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body):
            name = texts.get("NAME") or path.stem.replace("_", "-")
            module = f"xtuner_lite.cli.{path.stem}"
            commands[name] = Command(name, module, texts.get("HELP", ""))
            if alias := texts.get("ALIAS"):
                commands[alias] = Command(alias, module, f"the same as {name}")
    return dict(sorted(commands.items()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    Args:
        argv: words of the command line without the program; None takes ``sys.argv``.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    commands = find_commands()
    chosen = next((word for word in words if not word.startswith("-")), None)
    if chosen is not None and chosen not in commands:
        hint = did_you_mean(chosen, commands) or ";"
        print(
            f"{_PROG}: unknown command {chosen!r}{hint} See: {_PROG} --help",
            file=sys.stderr,
        )
        return 2
    try:
        parser = _build_parser(commands, chosen)
        args = parser.parse_args(words)
        if chosen is None:
            parser.print_help()
            return 2
        return int(import_module(commands[chosen].module).run(args) or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _report(error)


def console_main() -> None:
    """What the installed ``xtuner-lite`` script calls."""
    sys.exit(main())


def _build_parser(commands: dict[str, Command], chosen: str | None) -> argparse.ArgumentParser:
    """The parser; only the chosen command's module is imported for its arguments."""
    parser = argparse.ArgumentParser(
        prog=_PROG, description="Fine-tune language models from Python config files."
    )
    parser.add_argument("--version", action="version", version=f"xtuner_lite {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in commands.values():
        subparser = subparsers.add_parser(command.name, help=command.help, description=command.help)
        if command.name == chosen:
            import_module(command.module).add_arguments(subparser)
    return parser


def _report(error: Exception) -> int:
    """Print an error: what we tell the user in short, anything else with its traceback."""
    code = getattr(error, "exit_code", 1)
    wanted = os.environ.get("XTUNER_LITE_TRACEBACK", "") not in ("", "0")
    if wanted or not _is_told(error):
        traceback.print_exception(type(error), error, error.__traceback__)
        return code
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    print(f"error: {text}", file=sys.stderr)
    return code


def _is_told(error: Exception) -> bool:
    """Whether one of our ``raise`` statements made the error, for the user to read.

    An error that Python or a library raised, even inside our code, is ours to look at: it keeps its
    traceback.
    """
    if hasattr(error, "exit_code"):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or _PACKAGE not in Path(frames[-1].filename).parents:
        return False
    return (frames[-1].line or "").startswith("raise ")


if __name__ == "__main__":
    console_main()
