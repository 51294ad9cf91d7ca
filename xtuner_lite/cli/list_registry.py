"""``xtuner-lite list``: what can be named in a config."""

from __future__ import annotations

import argparse
import os
import sys

from xtuner_lite.discovery import Entry, documentation_of

NAME = "list"
HELP = "list what a config can name: hooks, datasets, templates, ..."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments to its parser."""
    parser.add_argument(
        "registry", metavar="REGISTRY", nargs="?", default=None, help="e.g. hooks; none lists them"
    )
    parser.add_argument(
        "pattern", metavar="PATTERN", nargs="?", default=None, help="part of a name, or wildcards"
    )
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE",
        help="a Python file that registers parts of yours",
    )


def run(args: argparse.Namespace) -> int:
    """Print names, descriptions and places; 1 when nothing fits, 2 for an unknown registry."""
    from xtuner_lite.plugins import declare_plugins
    from xtuner_lite.registry import REGISTRIES, describe
    from xtuner_lite.suggestions import did_you_mean

    declare_plugins(None, args.plugin)
    if args.registry is None:
        for name, registry in REGISTRIES.items():
            print(f"{name:<18}  {len(registry.entries()):>3} registered")
        return 0
    name = args.registry.lower().replace("-", "_")
    if name not in REGISTRIES:
        hint = did_you_mean(name, REGISTRIES) or ";"
        known = ", ".join(REGISTRIES)
        print(f"unknown registry {args.registry!r}{hint} Known: {known}", file=sys.stderr)
        return 2
    rows = describe(REGISTRIES[name], args.pattern)
    if not rows:
        print(f"no {REGISTRIES[name].name} fits {args.pattern!r}", file=sys.stderr)
        return 1
    width = max(len(row[0]) for row in rows)
    for part, place, text in rows:
        print(f"{part:<{width}}  {text}  [{_short(place)}]")
        for line in _example(REGISTRIES[name].entries()[part]):
            print(f"{'':<{width}}  {line}".rstrip())
    return 0


def _example(entry: Entry) -> list[str]:
    """The lines under 'Example row::' in a part's documentation; map functions have them."""
    lines = documentation_of(entry).partition("Example row::")[2].strip("\n").splitlines()
    end = next((i for i, line in enumerate(lines) if line and line[0] != " "), len(lines))
    return [line.removeprefix("    ") for line in lines[:end]]


def _short(place: str) -> str:
    """A place relative to the working folder, or from site-packages on."""
    for folder in (os.getcwd() + os.sep, *(f"{path}{os.sep}" for path in sys.path if path)):
        if place.startswith(folder):
            return place[len(folder) :]
    return place
