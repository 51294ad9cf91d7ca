"""`xtuner-lite serve MODEL`: an OpenAI-compatible server for a model and its adapter."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
from pathlib import Path

from xtuner_lite.cli._model_arguments import add_model_arguments, load_model

HELP = "serve a model or an adapter to programs, as OpenAI's API"

_KEY_VARIABLE = "XTUNER_LITE_API_KEY"
#: Largest requests: of texts, and with a few photographs in base64.
_TEXT_BYTES, _IMAGE_BYTES = 1 << 20, 20 << 20


class ServeError(ValueError):
    """The server cannot start as it was asked to."""

    exit_code = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``serve``."""
    parser.description = (
        "Answer OpenAI's chat completion requests (POST /v1/chat/completions, streamed or not, "
        "with tools) with a model of yours. Ctrl-C ends it."
    )
    add_model_arguments(parser)
    group = parser.add_argument_group("server")
    group.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on (default: 127.0.0.1, this machine only; others need --api-key)",
    )
    group.add_argument("--port", type=_port, default=8000, help="default: 8000; 0 takes a free one")
    group.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"what clients must send (default: ${_KEY_VARIABLE}, which other users of the machine "
        "cannot see; without either, none)",
    )
    group.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="the name requests give (default: the name of the adapter's or model's folder, or id)",
    )
    group.add_argument(
        "--max-request-bytes",
        type=_count,
        metavar="N",
        help=f"largest request (default: {_TEXT_BYTES}; {_IMAGE_BYTES} for a model that sees)",
    )
    group.add_argument(
        "--max-waiting",
        type=_count_or_zero,
        default=32,
        metavar="N",
        help="requests that may wait for the one that is answered; more get 503 (default: 32)",
    )
    group.add_argument(
        "--max-new-tokens",
        type=_count,
        metavar="N",
        help="longest answer, in tokens (default: what the model's context leaves)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs ``serve``; returns the exit code."""
    for package in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            print(
                f"error: serve needs the {package} package: pip install fastapi uvicorn",
                file=sys.stderr,
            )
            return 2
    from xtuner_lite.chat.listening import is_loopback, open_socket

    api_key = args.api_key if args.api_key is not None else os.environ.get(_KEY_VARIABLE)
    if api_key is not None and not (api_key.isascii() and api_key.strip() == api_key != ""):
        raise ServeError("the API key must be ASCII text without blanks around it; give another")
    is_local = is_loopback(args.host)
    if not is_local and api_key is None:
        raise ServeError(
            f"--host {args.host} can be reached from other machines, and no API key is given: "
            f"anybody could use the model. Give --api-key KEY (or ${_KEY_VARIABLE}), or leave "
            "--host out"
        )
    with open_socket(args.host, args.port) as opened:
        return _serve(args, opened, api_key)


def _serve(args: argparse.Namespace, opened: object, api_key: str | None) -> int:
    if sys.stderr.isatty():
        print(f"loading {args.model} ...", file=sys.stderr)
    model, tokenizer = load_model(args)

    from xtuner_lite.chat.listening import local_hosts
    from xtuner_lite.chat.server.app import build_app
    from xtuner_lite.chat.server.model import ServedModel
    from xtuner_lite.chat.server.replies import ReplyLine
    from xtuner_lite.chat.server.run import run_server

    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("xtuner_lite.chat.server").setLevel(logging.INFO)
    name = args.served_model_name or served_name(args.adapter or args.model)
    served = ServedModel(model, tokenizer, name)
    line = ReplyLine(model, tokenizer, max_waiting=args.max_waiting)
    app = build_app(
        served,
        line,
        api_key=api_key,
        max_request_bytes=args.max_request_bytes
        or (_IMAGE_BYTES if served.reads_images else _TEXT_BYTES),
        max_new_tokens=args.max_new_tokens,
        hosts=None if api_key is not None else local_hosts(args.host),
    )
    port = opened.getsockname()[1]
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"serving {name} at http://{host}:{port}/v1 (Ctrl-C ends)", file=sys.stderr, flush=True)
    return run_server(app, line, opened)


def served_name(path: str) -> str:
    """A short name for a model's or adapter's folder; an id is its own name."""
    folder = Path(path).expanduser()
    if not folder.exists():
        return path
    folder = folder.resolve()
    if folder.parent.name == "checkpoints":  # work_dirs/my_run/checkpoints/iter_60
        return f"{folder.parents[1].name}/{folder.name}"
    return folder.name


def _count(text: str) -> int:
    return _number(text, 1, None)


def _count_or_zero(text: str) -> int:
    return _number(text, 0, None)


def _port(text: str) -> int:
    return _number(text, 0, 65535)


def _number(text: str, least: int, most: int | None) -> int:
    value = int(text) if text.isascii() and text.isdigit() else -1
    if value < least or (most is not None and value > most):
        allowed = f"from {least} to {most}" if most is not None else f"from {least} up"
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; give a number {allowed}")
    return value
