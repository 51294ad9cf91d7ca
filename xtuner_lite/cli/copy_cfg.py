"""``xtuner-lite copy-cfg``: copy a config to edit it."""

from __future__ import annotations

import argparse

from xtuner_lite.config.catalog import copy_config

HELP = "copy a config to a folder of yours, to edit it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments to its parser."""
    parser.add_argument(
        "name", metavar="NAME", help="a name from `xtuner-lite list-cfg`, or a path"
    )
    parser.add_argument(
        "target",
        metavar="DIR",
        nargs="?",
        default=".",
        help="folder for NAME_copy.py, or a path that ends in .py (default: here)",
    )
    parser.add_argument(
        "--flatten",
        action="store_true",
        help="write every setting into one page that reads no base",
    )
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")


def run(args: argparse.Namespace) -> int:
    """Copy and say what to do next."""
    written = copy_config(args.name, args.target, flatten=args.flatten, force=args.force)
    print(f"{written}\nedit it, then: xtuner-lite train {written}")
    return 0
