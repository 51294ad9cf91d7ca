"""Serves the page: where it listens, who may come in, and how it ends."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING

from xtuner_lite.chat.listening import (
    ListenError,
    PortTaken,
    is_loopback,
    listen_on,
    open_socket,
)
from xtuner_lite.chat.web.guard import MAX_UPLOAD_BYTES, Guard
from xtuner_lite.chat.web.words import WORDS

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from xtuner_lite.chat.web.page import ChatPage

FIRST_PORT = 7860
_NUM_PORTS = 100
#: Seconds a wrong password costs, against guessing.
_WRONG_PASSWORD_S = 1.0


class WebPageError(ListenError):
    """The page cannot be served as it was asked for."""


def check_access(host: str, password: str | None, *, is_open: bool = False) -> None:
    """Raises WebPageError unless it is safe to listen on ``host``.

    Args:
        host: a name or address of this machine.
        password: what visitors must give; None for nothing.
        is_open: the user knows that everyone who reaches ``host`` may come in.
    """
    if password == "":
        raise WebPageError("the password is empty; give one of at least 1 character")
    if password is not None and is_open:
        raise WebPageError("a password and --no-password were given; leave one of them out")
    if password is None and not is_open and not is_loopback(host):
        raise WebPageError(
            f"--host {host} lets other machines in, and there is no password; give --password "
            "WORD, or leave --host out to be reached from this machine only (--no-password where "
            "something else guards the page, such as a Space)"
        )


def listen(host: str, port: int | None) -> socket.socket:
    """A socket that listens on ``port``, or on the first free one from 7860 when it is None.

    Raises:
        ListenError: the port is taken or may not be used, or the host is not this machine's.
    """
    if port is not None and not 0 < port < 65536:
        raise WebPageError(f"--port is {port}; allowed: 1 to 65535")
    for number in range(FIRST_PORT, FIRST_PORT + _NUM_PORTS) if port is None else [port]:
        try:
            opened = open_socket(host, number)
            try:
                listen_on(opened)
            except ListenError:
                opened.close()
                raise
            return opened
        except PortTaken:
            continue
    if port is None:
        last = FIRST_PORT + _NUM_PORTS - 1
        raise WebPageError(f"ports {FIRST_PORT} to {last} are all taken; give a free one: --port N")
    raise WebPageError(
        f"port {port} is taken by another program; give another one with --port, or leave --port "
        f"out for the first free one from {FIRST_PORT}"
    )


def build_app(
    page: ChatPage, *, password: str | None = None, hosts: Iterable[str] | None = None
) -> FastAPI:
    """The web application: the page behind its guard, with nothing else on it.

    Args:
        page: what is shown.
        password: what visitors must give, under any name; None lets everyone in.
        hosts: see Guard.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr
    from fastapi import FastAPI

    logging.getLogger("httpx").setLevel(logging.WARNING)
    without_docs = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    app = FastAPI(**without_docs)
    language = "en" if page.options.language == "auto" else page.options.language
    gr.mount_gradio_app(
        app,
        page.blocks,
        path="/",
        app_kwargs=without_docs,
        auth=None if password is None else _password_check(password),
        auth_message=WORDS[language]["password"],
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        show_error=True,
        max_file_size=MAX_UPLOAD_BYTES,
        i18n=page.i18n(),
        **page.style(),
    )
    app.add_middleware(Guard, takes_pictures=page.answerer.reads_images, hosts=hosts)
    return app


def build_server(app: FastAPI) -> uvicorn.Server:
    """A server of ``app`` that ends at once when told to, also with pages open."""
    import uvicorn

    class PageServer(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            for route in app.routes:  # the page's own streams last as long as it is open
                if stopped := getattr(getattr(route, "app", None), "stop_event", None):
                    stopped.set()
            # Answers that are cut off now are no errors; a next server sets the level anew.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            await super().shutdown(sockets)

    return PageServer(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))


def serve(app: FastAPI, listening: socket.socket) -> None:
    """Serves until Ctrl-C or a termination signal."""
    build_server(app).run(sockets=[listening])


def _password_check(password: str) -> Callable[[str, str], Awaitable[bool]]:
    async def is_right(name: str, given: str) -> bool:
        right = hmac.compare_digest(given.encode(), password.encode())
        if not right:
            await asyncio.sleep(_WRONG_PASSWORD_S)
        return right

    return is_right
