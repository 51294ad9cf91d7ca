"""``xtuner-lite list-cfg``: the shipped configs."""

from __future__ import annotations

import argparse
import sys

from xtuner_lite.config.catalog import list_configs

HELP = "list the shipped configs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments to its parser."""
    parser.add_argument(
        "-p",
        "--pattern",
        default=None,
        metavar="PATTERN",
        help="only configs whose name or folder contains PATTERN, or fits it if it has wildcards "
        "('*qlora*')",
    )


def run(args: argparse.Namespace) -> int:
    """Print name and description of each config; 1 when none fits."""
    found = list_configs(args.pattern)
    if not found:
        print(
            f"no config fits {args.pattern!r}; see them all: xtuner-lite list-cfg", file=sys.stderr
        )
        return 1
    width = max(len(info.name) for info in found)
    for info in found:
        print(f"{info.name:<{width}}  {info.description}".rstrip())
    return 0
