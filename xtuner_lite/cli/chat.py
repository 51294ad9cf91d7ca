"""`xtuner-lite chat MODEL`: talk to a model, before or after training."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Generator
from typing import TYPE_CHECKING

from xtuner_lite.cli._model_arguments import add_model_arguments, load_model

if TYPE_CHECKING:
    from xtuner_lite.chat.session import ChatSession

HELP = "talk to a model or an adapter in the terminal"

_COMMANDS = "/clear forgets the conversation, /exit leaves, Ctrl-C stops a reply"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``chat``."""
    parser.description = (
        "Talk to a model. Piped input is one turn per line; -p - takes all of it as one prompt."
    )
    add_model_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message (default: the template's)")
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="answer this once and leave")
    parser.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N", help="longest reply (default: 512)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 takes the likeliest token (default); 0.7 varies",
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling (default: 1)"
    )
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="sample from K tokens (default: all)"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="default: 1 (none)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the sampling")


def run(args: argparse.Namespace) -> int:
    """Runs ``chat``; returns the exit code."""
    try:
        session = _open_session(args)
        if args.prompt is not None:
            text = sys.stdin.read() if args.prompt == "-" else args.prompt
            return _answer_once(session, text)
        return _converse(session) if sys.stdin.isatty() else _answer_lines(session)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, ImportError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"error: {text}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # a download that failed, memory that is full
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _open_session(args: argparse.Namespace) -> ChatSession:
    for stream in (sys.stdin, sys.stdout):
        with contextlib.suppress(AttributeError):  # a test's replacement for the real stream
            stream.reconfigure(encoding="utf-8", errors="replace")
    if sys.stderr.isatty():
        print(f"loading {args.model} ...", file=sys.stderr)
    # Imports torch and transformers: seconds, so only now.
    from xtuner_lite.chat.session import ChatSession
    from xtuner_lite.models.generate import Sampling

    sampling = Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )
    model, tokenizer = load_model(args)
    return ChatSession(model, tokenizer, system=args.system, sampling=sampling)


def _answer_once(session: ChatSession, text: str) -> int:
    _print_pieces(session.send(text))
    return 0


def _answer_lines(session: ChatSession) -> int:
    """Each line of piped input is one turn of the same conversation."""
    for line in sys.stdin:
        text = line.strip()
        if text == "/exit":
            break
        if text == "/clear":
            session.clear()
        elif text:
            _print_pieces(session.send(text))
    return 0


def _converse(session: ChatSession) -> int:
    with contextlib.suppress(ImportError):  # line editing and history of input(), where it exists
        import readline  # noqa: F401
    print(_COMMANDS)
    while True:
        try:
            text = input("\nyou> ").strip()
        except KeyboardInterrupt:
            print("\n/exit leaves")
            continue
        except EOFError:
            print()
            return 0
        if text == "/exit":
            return 0
        if text == "/clear":
            session.clear()
            print("forgotten")
        elif text.startswith("/"):
            print(f"unknown command {text.split()[0]}; {_COMMANDS}")
        elif text:
            _reply_in_dialogue(session, text)


def _reply_in_dialogue(session: ChatSession, text: str) -> None:
    print("bot> ", end="", flush=True)
    try:
        _print_pieces(session.send(text))
    except KeyboardInterrupt:
        print(" [stopped]")
    except ValueError as error:  # a prompt longer than the model's context, a template that refuses
        print(f"\nerror: {error}")


def _print_pieces(pieces: Generator[str, None, None]) -> None:
    with contextlib.closing(pieces):  # Ctrl-C while printing ends the generation too
        for piece in pieces:
            print(piece, end="", flush=True)
    print()
