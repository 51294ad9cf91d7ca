"""``xtuner-lite report``: a run as one HTML page, or as a page that follows it."""

from __future__ import annotations

import argparse
import locale
import sys
from pathlib import Path

HELP = "a run as one HTML page: curves, chat samples, data ledger, config; --live follows it"

_DEFAULT_NAME = "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``xtuner-lite report``."""
    parser.description = (
        "Reads what a run has written and makes one page of it, which needs no network. It is "
        "made anew each time; runs that still go on are shown as far as they are."
    )
    parser.add_argument("work_dir", metavar="WORK_DIR", type=Path, help="of the run")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f"(default: WORK_DIR/{_DEFAULT_NAME})"
    )
    parser.add_argument(
        "--live", action="store_true", help="serve the page on 127.0.0.1 and renew it"
    )
    parser.add_argument(
        "--port", type=int, default=8321, metavar="N", help="of --live (default: 8321; 0: any)"
    )
    parser.add_argument(
        "--refresh", type=_seconds, default=10, metavar="S", help="seconds, of --live (10)"
    )
    parser.add_argument("--lang", choices=("en", "zh"), help="of the headings (default: yours)")


def run(args: argparse.Namespace) -> int:
    """Writes or serves the page; returns the exit code."""
    language = args.lang or ("zh" if (locale.getlocale()[0] or "").startswith("zh") else "en")
    try:
        if args.live:
            return _serve(args, language)
        return _write(args, language)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _write(args: argparse.Namespace, language: str) -> int:
    from xtuner_lite.report.page import render_report
    from xtuner_lite.report.run_record import read_run

    page = render_report(read_run(args.work_dir), language=language)
    target = args.out or args.work_dir / _DEFAULT_NAME
    if target.is_dir():
        raise ValueError(f"--out {target} is a folder; name a file, e.g. {target / _DEFAULT_NAME}")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(target.name + ".tmp")
    aside.write_text(page, encoding="utf-8")
    aside.replace(target)
    print(f"wrote {target} ({len(page) // 1024} KiB); open it in a browser")
    return 0


def _serve(args: argparse.Namespace, language: str) -> int:
    from xtuner_lite.report.live import HOST, LiveReport, make_server

    report = LiveReport(args.work_dir, language=language, refresh_s=args.refresh)
    with make_server(report, args.port) as server:
        address = f"http://{HOST}:{server.server_port}/"
        print(f"{address} follows {args.work_dir}; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


def _seconds(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1 second")
    return value
