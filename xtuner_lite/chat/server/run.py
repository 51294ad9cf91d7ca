"""From arguments to a server that runs until Ctrl-C."""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
import sys
from typing import TYPE_CHECKING, Any

import uvicorn

if TYPE_CHECKING:  # torch comes with it, and a port in use is to be told before
    from xtuner_lite.chat.server.replies import ReplyLine

#: Seconds that open answers get to end after Ctrl-C.
_GRACE_S = 3


class ServeError(ValueError):
    """The server cannot start as it was asked to."""

    exit_code = 2


def open_socket(host: str, port: int) -> socket.socket:
    """A bound socket, on which nobody is answered yet.

    Bound before the model is loaded, a port in use is told at once.

    Raises:
        ServeError: the port is taken or not allowed, or this machine has no such address.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        opened = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ServeError(f"--host {host}: {error}; give an address of this machine") from error
    try:
        if sys.platform != "win32":  # there it would share the port
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except OSError as error:
        opened.close()
        raise ServeError(_why_not(error, host, port)) from error
    return opened


def _why_not(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is taken; give another one with --port, or end what uses it"
    if error.errno == errno.EACCES:
        return f"port {port} needs rights this user does not have; give a --port above 1023"
    return f"--host {host} --port {port}: {error.strerror}; give an address of this machine"


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach the address.

    Raises:
        ServeError: no such host.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ServeError(f"--host {host}: {error}; give an address of this machine") from error
    return all(ipaddress.ip_address(entry[4][0].split("%")[0]).is_loopback for entry in found)


class Server(uvicorn.Server):
    """A uvicorn server that ends open replies before it waits for their connections."""

    def __init__(self, app: Any, line: ReplyLine) -> None:
        config = uvicorn.Config(
            app, log_config=None, access_log=False, timeout_graceful_shutdown=_GRACE_S, ws="none"
        )
        super().__init__(config)
        self._line = line

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends replies, then connections."""
        self._line.close()
        await super().shutdown(sockets)


def run_server(app: Any, line: ReplyLine, opened: socket.socket) -> int:
    """Serves until Ctrl-C or SIGTERM; returns the exit code.

    Raises:
        ServeError: another program took the port after it was bound here.
    """
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    host, port = opened.getsockname()[:2]
    try:
        opened.listen(128)  # several sockets may be bound to a port until one of them listens
    except OSError as error:
        raise ServeError(_why_not(error, host, port)) from error
    try:
        Server(app, line).run(sockets=[opened])
    except KeyboardInterrupt:
        return 130
    finally:
        line.close()
        line.wait_closed(_GRACE_S)
    return 0
