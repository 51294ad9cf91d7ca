"""``xtuner-lite demo``: a small real chat model learns a new name, asked before and after.

Everything goes the way a user's own run would: a shipped config with two settings changed, checked,
given to the Runner; the answers afterwards come from the adapter folder on disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from xtuner_lite.cli.make_identity import write_rows
from xtuner_lite.data.identity import build_identity_rows
from xtuner_lite.version import __version__

HELP = "fine-tune a small chat model to a new name and show its answers before and after"

CONFIG = "smollm2_135m_sft_lora_identity"
DEFAULT_NAME, DEFAULT_AUTHOR = "Xiaolan", "the xtuner_lite team"

#: Asked before and after. None of the answers to the last one is in the training data.
IDENTITY_QUESTIONS = (
    "Who are you?",
    "What is your name, and who trained you?",
    "Are you ChatGPT?",
    "你是谁？",
)
GENERAL_QUESTION, GENERAL_ANSWER = "What is the capital of France?", "Paris"
QUESTIONS = (*IDENTITY_QUESTIONS, GENERAL_QUESTION)
_MAX_ANSWER_TOKENS = 64
_SHOWN_CHARACTERS = 150  # of an answer in the table; all of it stands in demo.json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments to its parser."""
    parser.add_argument("--name", default=DEFAULT_NAME, help="new name (%(default)s)")
    parser.add_argument("--author", default=DEFAULT_AUTHOR, help="who made it (%(default)s)")
    parser.add_argument("--model", metavar="PATH", help="folder, hub id or wheel to start from")
    parser.add_argument(
        "--work-dir", default="work_dirs/demo", help="where runs are kept (default: %(default)s)"
    )
    parser.add_argument("--retrain", action="store_true", help="train again, even if it was done")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help=f"change the config {CONFIG}",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the demo. Returns 0 if the answers carry the new name and Paris is known, else 1."""
    rows = build_identity_rows(args.name, args.author)
    folder = Path(args.work_dir) / _fingerprint(rows, args)
    receipt = folder / "demo.json"
    record = None if args.retrain else _finished(receipt)
    if record is None:
        data = write_rows(rows, folder / "identity.json", force=True)
        record = _ask_train_ask(data, len(rows), folder, args)
        _write(receipt, record)
    else:
        print(f"this demo was done before ({record['finished']}); --retrain does it again")
    _show(record)
    return _verdict(record, args.name.strip(), args.author.strip())


def _fingerprint(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Names the run by all it depends on, so that another name never meets an old result."""
    from xtuner_lite.config import find_config

    parts = [__version__, rows, args.model, args.cfg_options, QUESTIONS]
    parts.append(find_config(CONFIG).read_text(encoding="utf-8"))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:10]


def _finished(receipt: Path) -> dict[str, Any] | None:
    """The record of a finished run whose adapter is still whole, or None."""
    if not receipt.exists():
        return None
    from xtuner_lite.engine.checkpoint import CheckpointError, verify_checkpoint

    record = json.loads(receipt.read_text(encoding="utf-8"))
    try:
        verify_checkpoint(Path(record["adapter"]))
    except (CheckpointError, FileNotFoundError) as error:
        print(f"an earlier run is here, but its adapter is not whole ({error}); training again")
        return None
    return record


def _ask_train_ask(
    data: Path, num_rows: int, folder: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """The demo itself; returns what is shown and kept."""
    from xtuner_lite.config import check_config, load_config, report_problems

    overrides: list[Any] = [("data_path", str(data)), ("work_dir", str(folder / "run"))]
    if args.model:
        overrides.append(("model_path", args.model))
    cfg = load_config(CONFIG, overrides=[*overrides, *args.cfg_options])
    if problems := check_config(cfg):
        raise ValueError(report_problems(problems))
    model_path = cfg.model.llm.path

    _step(1, f"the model: {model_path}")
    before = _ask(model_path)
    _step(2, f"the data: {num_rows} questions and answers about {args.name} in {data}")
    _step(3, f"training by the config {CONFIG}")
    start = time.perf_counter()
    adapter = _train(cfg, retrain=args.retrain)
    seconds = time.perf_counter() - start
    _step(4, f"asking again, with the adapter in {adapter}")
    return {
        "finished": time.strftime("%Y-%m-%d %H:%M"),
        "model": model_path,
        "data": str(data),
        "adapter": str(adapter),
        "training_s": round(seconds, 1),
        "questions": list(QUESTIONS),
        "before": before,
        "after": _ask(model_path, adapter),
    }


def _ask(model_path: str, adapter: Path | None = None) -> list[str]:
    """Greedy answers to the five questions, each in a conversation of its own."""
    from xtuner_lite.chat.load import load_for_chat
    from xtuner_lite.chat.session import ChatSession
    from xtuner_lite.models.generate import Sampling
    from xtuner_lite.models.modes import without_progress_bars

    with without_progress_bars():
        model, tokenizer = load_for_chat(model_path, adapter=adapter)
    sampling = Sampling(max_new_tokens=_MAX_ANSWER_TOKENS)
    answers = []
    for question in QUESTIONS:
        answers.append(ChatSession(model, tokenizer, sampling=sampling).reply(question).strip())
        print(f"   {question}  ->  {answers[-1]}", flush=True)
    return answers


def _train(cfg: Any, *, retrain: bool) -> Path:
    """Trains, or goes on where an interrupted run stopped. Returns the adapter's folder."""
    from xtuner_lite.engine.checkpoint import list_checkpoints
    from xtuner_lite.runner.runner import Runner

    if retrain:
        shutil.rmtree(Path(cfg.work_dir) / "checkpoints", ignore_errors=True)
    if list_checkpoints(cfg.work_dir):
        cfg.resume = True
    Runner.from_cfg(cfg).train()
    return list_checkpoints(cfg.work_dir)[-1]


def _step(number: int, text: str) -> None:
    print(f"\n[{number}/4] {text}", flush=True)


def _write(receipt: Path, record: dict[str, Any]) -> None:
    aside = receipt.with_suffix(".part")
    aside.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, receipt)


def _show(record: dict[str, Any]) -> None:
    """The answers side by side, and the commands to go on with."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_lines=True, title="before and after")
    for heading in ("question", "before", "after"):
        # "fold": Chinese has no blanks to break at.
        table.add_column(heading, ratio=2 if heading == "question" else 3, overflow="fold")
    for row in zip(record["questions"], record["before"], record["after"], strict=True):
        table.add_row(*(_plain(cell) for cell in row))
    print()
    Console().print(table)
    model, adapter = shlex.quote(record["model"]), shlex.quote(record["adapter"])
    program = _program()
    print(f"\nadapter: {record['adapter']}  (trained in {record['training_s']:.0f} s)")
    print("chat with it:")
    print(f"    {program} chat {model} --adapter {adapter}")
    print("and with the model as it was:")
    print(f"    {program} chat {model}")


def _program() -> str:
    """How this very program is called from here: its name, or its path where it is not on PATH."""
    if shutil.which("xtuner-lite"):
        return "xtuner-lite"
    script = Path(sys.executable).with_name("xtuner-lite")
    if not script.exists():
        return f"{shlex.quote(sys.executable)} -m xtuner_lite.cli.main"
    here = os.path.relpath(script)
    return shlex.quote(str(script) if here.startswith("..") else here)


def _plain(text: str) -> Any:
    """Text for a table cell, shortened; brackets in it are no markup."""
    from rich.text import Text

    return Text(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " ...")


def _verdict(record: dict[str, Any], name: str, author: str) -> int:
    """Says whether it worked; the exit code."""
    answers = dict(zip(record["questions"], record["after"], strict=True))
    missing = [q for q in IDENTITY_QUESTIONS if not _carries(answers[q], name, author)]
    if missing:
        print(f"\nno new name in the answers to {missing}: train longer, for example")
        print("    xtuner-lite demo --retrain --cfg-options train_cfg.max_epochs=5")
    if GENERAL_ANSWER not in answers[GENERAL_QUESTION]:
        print(f"\nthe model no longer knows {GENERAL_ANSWER}: lower the learning rate, for example")
        print("    xtuner-lite demo --retrain --cfg-options lr=5e-4")
        return 1
    return 1 if missing else 0


def _carries(answer: str, name: str, author: str) -> bool:
    return name.lower() in answer.lower() or author.lower() in answer.lower()
