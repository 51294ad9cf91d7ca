"""The report of a run that goes on, on a page of this machine that renews itself."""

from __future__ import annotations

import threading
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from xtuner_lite.report.page import render_report
from xtuner_lite.report.run_record import files_of, read_run

HOST = "127.0.0.1"
#: Names by which a browser of this machine may ask; any other is a page that tries to read ours.
_OWN_NAMES = {"127.0.0.1", "localhost", "[::1]"}


class LiveReport:
    """The page of a work_dir, made anew when the run has written something.

    Args:
        work_dir: of the run.
        language: see page.render_report.
        refresh_s: seconds between two looks.

    Raises:
        FileNotFoundError, ValueError: see run_record.read_run.
    """

    def __init__(self, work_dir: Path, *, language: str = "en", refresh_s: int = 10) -> None:
        read_run(work_dir)  # a wrong folder is told at once
        self._work_dir, self._language, self._refresh_s = work_dir, language, refresh_s
        self._seen: object = None
        self._page = ""
        self._lock = threading.Lock()

    def page(self) -> str:
        """The page as it stands now."""
        with self._lock:
            seen = [
                (path, stat.st_mtime_ns, stat.st_size)
                for path in files_of(self._work_dir)
                if path.exists() and (stat := path.stat())
            ]
            run = read_run(self._work_dir)
            if (seen, run.is_running) != self._seen:
                self._page = render_report(run, language=self._language, refresh_s=self._refresh_s)
                self._seen = (seen, run.is_running)
            return self._page


def make_server(report: LiveReport, port: int) -> ThreadingHTTPServer:
    """A server of the page on 127.0.0.1; port 0 takes a free one.

    Raises:
        ValueError: the port is taken, or may not be used.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = (self.headers.get("Host") or "").rpartition(":")
            host = name[0] or name[2]
            if host not in _OWN_NAMES:
                self.send_error(HTTPStatus.FORBIDDEN, "only for this machine")
                return
            if self.path != "/":
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            body = report.page().encode()
            with suppress(ConnectionError):  # the reader left while the page was made
                self.send_response(HTTPStatus.OK)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """A line for each look would bury the address."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise ValueError(
            f"port {port} of {HOST} cannot be used ({error.strerror}); choose another by --port, "
            "or --port 0 for any free one"
        ) from error
