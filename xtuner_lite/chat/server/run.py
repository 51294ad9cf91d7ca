"""From arguments to a server that runs until Ctrl-C."""

from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING, Any

import uvicorn

from xtuner_lite.chat.listening import listen_on

if TYPE_CHECKING:  # torch comes with it, and a port in use is to be told before
    from xtuner_lite.chat.server.replies import ReplyLine

#: Seconds that open answers get to end after Ctrl-C.
_GRACE_S = 3


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
        ListenError: another program took the port after it was bound here.
    """
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    listen_on(opened)
    try:
        Server(app, line).run(sockets=[opened])
    except KeyboardInterrupt:
        return 130
    finally:
        line.close()
        line.wait_closed(_GRACE_S)
    return 0
