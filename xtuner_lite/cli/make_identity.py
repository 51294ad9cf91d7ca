"""``xtuner-lite make-identity``: write a self-introduction data set for a name and an author."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from xtuner_lite.data.identity import LANGUAGES, build_identity_rows

HELP = "write data that teach a model its name and its author (OpenAI messages format)"


class OutputError(ValueError):
    """The file cannot be written as asked."""

    exit_code = 2  # a mistake of the user's, told without traceback


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments to its parser."""
    parser.add_argument(
        "out", metavar="OUT", help="file to write: .json (a list) or .jsonl (lines)"
    )
    parser.add_argument("--name", required=True, help="what the model shall call itself")
    parser.add_argument("--author", required=True, help="who made it")
    parser.add_argument(
        "-n",
        "--num-rows",
        type=int,
        default=None,
        metavar="N",
        help="number of rows (default: every question once, about 75 a language)",
    )
    parser.add_argument(
        "--lang",
        type=lambda text: text.split(","),
        default=list(LANGUAGES),
        metavar="en,zh",
        help="languages of the questions, with a comma between (default: en,zh)",
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUT if it exists")


def run(args: argparse.Namespace) -> int:
    """Writes the file and says what is in it. Returns the exit code.

    Raises:
        IdentityError: see :func:`build_identity_rows`.
        OutputError: see :func:`write_rows`.
    """
    rows = build_identity_rows(args.name, args.author, args.num_rows, args.lang)
    path = write_rows(rows, Path(args.out), force=args.force)
    question, answer = (message["content"] for message in rows[0]["messages"])
    print(f"wrote {len(rows)} rows to {path}")
    print(f"the first one: {question}  ->  {answer}")
    print(f"train on it: set data_path = {str(path)!r} in a copied config")
    return 0


def write_rows(rows: list[dict[str, Any]], path: Path, *, force: bool = False) -> Path:
    """Writes the rows as JSON (one list) or JSON lines, by the ending of ``path``; atomic.

    Returns:
        The path written.

    Raises:
        OutputError: the ending is neither .json nor .jsonl, or the file is there and ``force`` is
            False.
    """
    path = path.expanduser()
    if path.suffix not in (".json", ".jsonl"):
        raise OutputError(f"{path}: the ending must be .json or .jsonl; rename the output file")
    if path.exists() and not force:
        raise OutputError(
            f"{path} exists and is not overwritten; give another name, or --force to replace it"
        )
    if path.suffix == ".json":
        text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path
