"""`xtuner-lite chat MODEL`: talk to a model, before or after training."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from xtuner_lite.cli._model_arguments import add_model_arguments, load_model
from xtuner_lite.cli._sampling_arguments import add_sampling_arguments, sampling_of

if TYPE_CHECKING:
    from xtuner_lite.chat.batch import BatchRow
    from xtuner_lite.chat.session import ChatSession
    from xtuner_lite.models.sampling import Sampling

HELP = "talk to a model or an adapter in the terminal"


class ChatError(ValueError):
    """A prompt, an option or a file that cannot be used."""

    exit_code = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``chat``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Talk to a model. Piped input is one turn per line; -p - takes all of it as one prompt.\n"
        "In the dialogue, /help lists the commands."
    )
    parser.epilog = "system templates (--system-template):\n" + "\n".join(
        f"  {name:<14}  {text}" for name, text in _system_prompts().items()
    )
    add_model_arguments(parser)
    _add_talk_arguments(parser.add_argument_group("conversation"))
    replies = parser.add_argument_group("replies")
    add_sampling_arguments(replies, temperature=0.0, top_p=1.0)
    replies.add_argument(
        "--stop-words",
        nargs="+",
        action="extend",
        default=[],
        metavar="TEXT",
        help="a reply ends before the first of these",
    )


def _add_talk_arguments(group: argparse._ArgumentGroup) -> None:
    systems = group.add_mutually_exclusive_group()
    systems.add_argument(
        "--system", metavar="TEXT", help="system message (default: the template's)"
    )
    systems.add_argument("--system-template", metavar="NAME", help="a named one, see below")
    inputs = group.add_mutually_exclusive_group()
    inputs.add_argument("-p", "--prompt", metavar="TEXT", help="answer this once and leave")
    inputs.add_argument(
        "--batch",
        metavar="FILE",
        help="answer each prompt of a file: a .txt with one per line, or .json/.jsonl rows with "
        "'prompt' or 'messages' (and 'images')",
    )
    group.add_argument(
        "--image",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="for models that see: pictures that the prompt, or the first question, is about",
    )
    group.add_argument(
        "--out", metavar="FILE", help="for --batch: a new file for the JSON lines (default: stdout)"
    )
    group.add_argument("--bot-name", default="bot", metavar="NAME", help="default: bot")
    group.add_argument(
        "--no-streamer", action="store_true", help="show a reply only when it is complete"
    )


def run(args: argparse.Namespace) -> int:
    """Runs ``chat``; returns the exit code."""
    from xtuner_lite.chat.terminal_output import use_utf8

    use_utf8()
    try:
        return _run(args)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) or hasattr(error, "exit_code"):
            raise
        raise ChatError(str(error)) from error


def _run(args: argparse.Namespace) -> int:
    from xtuner_lite.chat.terminal import TerminalChat
    from xtuner_lite.chat.terminal_output import print_reply

    sampling, system = _sampling(args), _system(args)
    images = _images(args)
    prompt = _prompt(args)
    if args.batch is not None:
        return _run_batch(args, sampling, system)
    session = _open_session(args, sampling, system)
    streamed = not args.no_streamer
    if prompt is not None:
        print_reply(session.send(prompt, images), streamed=streamed)
        return 0
    talk = TerminalChat(session, bot_name=args.bot_name, streamed=streamed, images=images)
    talk.converse() if sys.stdin.isatty() else talk.answer_lines()
    return 0


def _sampling(args: argparse.Namespace) -> Sampling:
    from xtuner_lite.chat.terminal_output import well_formed

    return sampling_of(args, stop_words=tuple(map(well_formed, args.stop_words)))


def _system_prompts() -> dict[str, str]:
    """Name -> description of the registered system prompts; read, not imported."""
    from xtuner_lite.discovery import index_package

    return {
        entry.name: entry.description
        for variable, entry in index_package("xtuner_lite.templates.system_prompts")
        if variable == "SYSTEM_PROMPTS"
    }


def _system(args: argparse.Namespace) -> str | None:
    from xtuner_lite.chat.terminal_output import well_formed

    if args.system_template is None:
        return None if args.system is None else well_formed(args.system)
    if args.system_template not in _system_prompts():
        from xtuner_lite.suggestions import did_you_mean

        hint = did_you_mean(args.system_template, _system_prompts()) or ";"
        raise ChatError(
            f"unknown system template {args.system_template!r}{hint} known: "
            f"{', '.join(_system_prompts())}"
        )
    from xtuner_lite.templates.system_prompts import system_prompt

    return system_prompt(args.system_template)


def _prompt(args: argparse.Namespace) -> str | None:
    """The one prompt of -p; None where there is none."""
    from xtuner_lite.chat.terminal_output import tell_unreadable, well_formed

    if args.out is not None and args.batch is None:
        raise ChatError("--out is for --batch; send stdout to a file: ... > answers.txt")
    if sys.stdin is None and args.prompt in (None, "-") and args.batch is None:
        raise ChatError("there is no input; give a prompt with -p TEXT")
    if args.prompt is None:
        return None
    text = sys.stdin.read() if args.prompt == "-" else well_formed(args.prompt)
    tell_unreadable(text)
    if not text.strip():
        raise ChatError("the prompt is empty; give a text: -p 'Who are you?'")
    return text


def _images(args: argparse.Namespace) -> list[str]:
    """The paths of --image, each of which can be read."""
    if args.image and args.batch is not None:
        raise ChatError(
            "--image goes with a prompt or a dialogue; the rows of --batch name their own: "
            '{"prompt": "...", "images": ["a.png"]}'
        )
    if not args.image:
        return []
    from xtuner_lite.images.turns import local_image

    return [local_image(name)[0] for name in args.image]


def _open_session(args: argparse.Namespace, sampling: Sampling, system: str | None) -> ChatSession:
    from xtuner_lite.chat.terminal_output import Waiting

    with Waiting(f"loading {args.model}"):
        model, tokenizer = load_model(args, with_images=bool(args.image))
    from xtuner_lite.chat.session import ChatSession

    return ChatSession(model, tokenizer, system=system, sampling=sampling)


def _run_batch(args: argparse.Namespace, sampling: Sampling, system: str | None) -> int:
    from xtuner_lite.chat.batch import read_batch

    rows = read_batch(Path(args.batch).expanduser())
    if args.out is not None and Path(args.out).expanduser().exists():
        raise ChatError(f"{args.out} exists and is left as it is; give another --out")
    session = _open_session(args, sampling, system)
    with contextlib.ExitStack() as stack:
        out: TextIO = sys.stdout
        if args.out is not None:
            out = stack.enter_context(Path(args.out).expanduser().open("x", encoding="utf-8"))
        num_failed = _write_answers(session, rows, out)
    if num_failed:
        print(f"{num_failed} of {len(rows)} prompts have an error", file=sys.stderr)
    return 1 if num_failed else 0


def _write_answers(session: ChatSession, rows: list[BatchRow], out: TextIO) -> int:
    """Writes each answer as it comes; returns how many prompts had none."""
    from xtuner_lite.chat.batch import answer_batch, json_line
    from xtuner_lite.chat.terminal_output import Waiting

    num_failed = 0
    with Waiting(f"answering 1 of {len(rows)}") as waiting:
        for number, answer in enumerate(answer_batch(session, rows), start=1):
            num_failed += "error" in answer
            print(json_line(answer), file=out, flush=True)
            waiting.update(f"answering {number + 1} of {len(rows)}")
    return num_failed
