"""Where the page and the server listen, and under which names they may be asked."""

from __future__ import annotations

import errno
import ipaddress
import socket
import sys

_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


class ListenError(ValueError):
    """An address or port that cannot be listened on."""

    exit_code = 2


class PortTaken(ListenError):
    """Another program listens on the port."""


def open_socket(host: str, port: int) -> socket.socket:
    """A bound socket, on which nobody is answered yet.

    Bound before the model is loaded, a port in use is told at once.

    Args:
        host: a name or address of this machine; an IPv6 address with brackets or without.
        port: 0 takes a free one.

    Raises:
        PortTaken: by another program that listens.
        ListenError: the port may not be used, or this machine has no such address.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        opened = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _no_address(host, error) from error
    try:
        if sys.platform != "win32":  # there it would share the port
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except OSError as error:
        opened.close()
        raise _why_not(error, host, port) from error
    return opened


def listen_on(opened: socket.socket) -> None:
    """Lets clients connect; several sockets may be bound to a port until one of them does this.

    Raises:
        PortTaken: another program took the port after it was bound here.
    """
    host, port = opened.getsockname()[:2]
    try:
        opened.listen(128)
    except OSError as error:
        raise _why_not(error, host, port) from error


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach the address.

    Raises:
        ListenError: no such host.
    """
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise _no_address(host, error) from error
    return all(ipaddress.ip_address(entry[4][0].split("%")[0]).is_loopback for entry in found)


def local_hosts(host: str) -> frozenset[str]:
    """Names in the ``Host`` header of who asks a program that listens on this machine alone.

    Any web page that the user visits can have its own name lead to this machine (DNS rebinding);
    without a key or password, the name is what tells its requests apart.
    """
    return frozenset({*_LOCAL_NAMES, host.lower()})


def host_name(header: str) -> str:
    """The name in a ``Host`` header, without its port."""
    header = header.lower()
    return header.rpartition(":")[0] if ":" in header and not header.endswith("]") else header


def _no_address(host: str, error: OSError) -> ListenError:
    return ListenError(f"--host {host}: {error.strerror or error}; give an address of this machine")


def _why_not(error: OSError, host: str, port: int) -> ListenError:
    if error.errno == errno.EADDRINUSE:
        return PortTaken(
            f"port {port} of {host} is taken; give another one with --port, or end what uses it"
        )
    if error.errno == errno.EACCES:
        return ListenError(
            f"port {port} needs rights this user does not have; give a --port above 1023"
        )
    return ListenError(
        f"--host {host} --port {port}: {error.strerror}; give an address of this machine"
    )
