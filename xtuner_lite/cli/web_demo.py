"""`xtuner-lite web-demo MODEL`: a web page to talk to a model, alone or beside its base model."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

from xtuner_lite.cli._model_arguments import add_model_arguments, load_model
from xtuner_lite.cli._sampling_arguments import add_sampling_arguments, sampling_of
from xtuner_lite.models.hub import WHEEL_PREFIX
from xtuner_lite.models.sampling import Sampling

HELP = "talk to a model in the browser, beside its base model if it has an adapter"

PASSWORD_VARIABLE = "XTUNER_LITE_WEB_PASSWORD"


class WebDemoError(ValueError):
    """The arguments do not make a page."""

    exit_code = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``web-demo``."""
    parser.description = (
        "Serve a web page to talk to a model, on this machine only unless --host says otherwise. "
        "With --bundle, write a folder for a Hugging Face Space or OpenXLab instead."
    )
    add_model_arguments(parser)
    page = parser.add_argument_group("page")
    page.add_argument("--bot-name", metavar="NAME", help="title of the page (default: the model's)")
    page.add_argument(
        "--lang",
        choices=("auto", "en", "zh"),
        default="auto",
        help="language of the page (default: the browser's)",
    )
    page.add_argument(
        "--compare", action="store_true", help="start with the base model beside the adapter"
    )
    page.add_argument("--system", metavar="TEXT", default="", help="system prompt to start with")
    page.add_argument(
        "--max-characters",
        type=int,
        default=20_000,
        metavar="N",
        help="longest message (default: 20000)",
    )
    sampling = parser.add_argument_group("sampling, to start with")
    add_sampling_arguments(sampling, temperature=0.7, top_p=0.9)
    access = parser.add_argument_group("access")
    access.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on (default: 127.0.0.1, this machine only)",
    )
    access.add_argument(
        "--port", type=int, metavar="N", help="port (default: the first free one from 7860)"
    )
    access.add_argument(
        "--password",
        metavar="WORD",
        default=os.environ.get(PASSWORD_VARIABLE) or None,
        help=f"asked of every visitor (or set ${PASSWORD_VARIABLE})",
    )
    access.add_argument(
        "--no-password",
        action="store_true",
        help="let in everyone who reaches --host, where something else guards it",
    )
    parser.add_argument(
        "--bundle", metavar="DIR", help="write DIR, ready to push to a Space, and serve nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Runs ``web-demo``; returns the exit code."""
    from xtuner_lite.chat.web.server import FIRST_PORT, build_app, check_access, listen, serve

    sampling = _check(args)
    if importlib.util.find_spec("gradio") is None:
        raise WebDemoError("the page needs the gradio package: pip install 'xtuner_lite[web]'")
    if args.bundle is not None:
        from xtuner_lite.cli._web_bundle import write_bundle

        print(write_bundle(args, bot_name=args.bot_name or shown_name(args.model)))
        return 0
    check_access(args.host, args.password, is_open=args.no_password)
    listening = listen(args.host, args.port)
    with listening:
        print(f"loading {args.model} ...", file=sys.stderr)
        model, tokenizer = load_model(args)
        from xtuner_lite.chat.listening import local_hosts
        from xtuner_lite.chat.web.answerer import Answerer
        from xtuner_lite.chat.web.page import ChatPage, PageOptions

        options = PageOptions(
            bot_name=args.bot_name or shown_name(args.model),
            subtitle=_subtitle(args),
            system=args.system,
            sampling=sampling,
            compare=args.compare,
            language=args.lang,
            max_characters=args.max_characters,
        )
        answerer = Answerer(model, tokenizer)
        hosts = None if args.password or args.no_password else local_hosts(args.host)
        app = build_app(ChatPage(answerer, options), password=args.password, hosts=hosts)
        port = listening.getsockname()[1]
        if args.port is None and port != FIRST_PORT:
            print(f"port {FIRST_PORT} is taken; the page is on {port} (--port N chooses one)")
        print(f"{options.bot_name}: {_address(args.host, port)}  (Ctrl-C ends it)", flush=True)
        try:
            serve(app, listening)
        finally:
            if answerer.num_asking:
                print("ending the answer that is being made ...", file=sys.stderr)
            answerer.close()
    return 0


def _check(args: argparse.Namespace) -> Sampling:
    if args.max_characters < 1:
        raise WebDemoError(f"--max-characters is {args.max_characters}; it must be 1 or more")
    try:
        return sampling_of(args)
    except ValueError as error:
        raise WebDemoError(str(error)) from error


def shown_name(path: str) -> str:
    """What visitors read of a model's path: an id as it is, of a folder its last part only."""
    if Path(path).expanduser().exists():
        return Path(path).expanduser().resolve().name
    from xtuner_lite.models.wheels import KNOWN_WHEELS  # imports torch

    wheel = KNOWN_WHEELS.get(path.removeprefix(WHEEL_PREFIX))
    return wheel.model_name if wheel else path


def _subtitle(args: argparse.Namespace) -> str:
    names = [args.model] if args.bot_name or args.adapter else []
    names += [args.adapter] if args.adapter else []
    return " + ".join(shown_name(name) for name in names)


def _address(host: str, port: int) -> str:
    if host in ("0.0.0.0", "::"):
        return f"http://<address of this machine>:{port}"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
