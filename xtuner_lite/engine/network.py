"""Which network interface leads to another host."""

from __future__ import annotations

import os
import socket
import struct
import sys

_SIOCGIFADDR = 0x8915


def interface_towards(host: str, port: int = 29500) -> str | None:
    """Name of the interface that packets to ``host`` leave by, e.g. 'eth0'; None if unknown.

    gloo takes the interface of the host's own name, which on many machines is the loopback: then
    ranks of two machines cannot reach each other. Nothing is sent.
    """
    if not sys.platform.startswith("linux"):
        return None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, socket.AF_INET, socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            ours = probe.getsockname()[0]
    except OSError:
        return None
    return next((name for _, name in socket.if_nameindex() if _address(name) == ours), None)


def set_gloo_interface(host: str) -> str | None:
    """Set GLOO_SOCKET_IFNAME to the interface towards ``host`` unless the user has; returns it."""
    if "GLOO_SOCKET_IFNAME" not in os.environ and (name := interface_towards(host)):
        os.environ["GLOO_SOCKET_IFNAME"] = name
    return os.environ.get("GLOO_SOCKET_IFNAME")


def _address(interface: str) -> str | None:
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", interface.encode()[:15])
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
        except OSError:  # it has no IPv4 address
            return None
    return socket.inet_ntoa(answer[20:24])
