"""What every request passes before its body is read: host, API key, size."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from typing import TYPE_CHECKING

from starlette.datastructures import Headers

from xtuner_lite.chat.listening import host_name
from xtuner_lite.chat.server.errors import ApiError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_OPEN_PATHS = ("/health",)

#: Bytes of a refused body that are read and thrown away. Many clients send all of it before they
#: read the answer, and would see a broken connection where an error was sent.
_DISCARDED = 64 << 20


class Gate:
    """ASGI middleware.

    Args:
        app: what lies behind.
        api_key: what ``Authorization: Bearer`` must carry; None lets everybody in.
        max_request_bytes: largest body.
        hosts: names that the ``Host`` header may carry, without port; None allows all. See
            listening.local_hosts.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        max_request_bytes: int,
        hosts: Iterable[str] | None = None,
    ) -> None:
        self.app = app
        self.api_key = api_key
        self.max_request_bytes = max_request_bytes
        self.hosts = None if hosts is None else {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers it with an error."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        try:
            self._check_host(headers)
            if scope["path"] not in _OPEN_PATHS:
                self._check_key(headers)
            self._check_size(headers)
        except ApiError as error:
            await _discard_body(receive)
            return await error.response()(scope, receive, send)
        read = 0

        async def receive_counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_request_bytes:  # a body that did not tell its size
                if message.get("more_body"):
                    await _discard_body(receive)
                raise self._too_large(f"more than {self.max_request_bytes}")
            return message

        await self.app(scope, receive_counted, send)

    def _check_host(self, headers: Headers) -> None:
        if self.hosts is None:
            return
        host = headers.get("host", "")
        if host_name(host) not in self.hosts:
            raise ApiError(
                403,
                f"the request names the host {host!r}; without an API key this server answers to "
                f"{', '.join(sorted(self.hosts))} only. Use one of these, or start it with "
                "--api-key",
                code="host_not_allowed",
            )

    def _check_key(self, headers: Headers) -> None:
        if self.api_key is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(), self.api_key.encode())
        if scheme.lower() != "bearer" or not same:
            what = "a wrong API key" if given else "no API key"
            raise ApiError(
                401,
                f"the request carries {what}; send the key that the server was started with, as "
                "'Authorization: Bearer KEY' (api_key= of OpenAI's client)",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_size(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if not length.isdigit():
            raise ApiError(400, f"Content-Length is {length!r}; it must be a number of bytes")
        if int(length) > self.max_request_bytes:
            raise self._too_large(length)

    def _too_large(self, given: str) -> ApiError:
        return ApiError(
            413,
            f"the request has {given} bytes; at most {self.max_request_bytes} are allowed. Shorten "
            "it, or start the server with a larger --max-request-bytes",
            code="request_too_large",
            headers={"Connection": "close"},  # what is left of the body is not read
        )


async def _discard_body(receive: Receive) -> None:
    left = _DISCARDED
    while left > 0:
        message = await receive()
        left -= len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body"):
            return
