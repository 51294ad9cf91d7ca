"""``xtuner-lite list-dataset-format``: the formats of rows that are read, with examples."""

from __future__ import annotations

import argparse
import sys

HELP = "list the formats of rows, how they are recognised, and an example of each"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments to its parser."""
    parser.add_argument(
        "pattern", metavar="PATTERN", nargs="?", default=None, help="part of a name, or wildcards"
    )
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE",
        help="a Python file that registers map functions of yours",
    )


def run(args: argparse.Namespace) -> int:
    """Print each format; 1 when nothing fits."""
    from xtuner_lite.data.map_fns.recognise import FORMATS
    from xtuner_lite.discovery import documentation_of
    from xtuner_lite.plugins import declare_plugins
    from xtuner_lite.registry import MAP_FNS, describe

    declare_plugins(None, args.plugin)
    rows = describe(MAP_FNS, args.pattern)
    if not rows:
        print(f"no format fits {args.pattern!r}", file=sys.stderr)
        return 1
    signs = {format_.map_fn: format_.signs for format_ in FORMATS.values() if format_.map_fn}
    for name, _, _ in rows:
        known = f"recognised by {signs[name]}" if name in signs else f"to be named: map_fn={name!r}"
        print(f"{name}  ({known})")
        for line in documentation_of(MAP_FNS.entries()[name]).splitlines():
            print(f"    {line}".rstrip())
        print()
    return 0
