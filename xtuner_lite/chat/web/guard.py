"""What every response of the page carries, and what is not let in."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from typing import Any

from xtuner_lite.chat.listening import host_name

#: Largest request in bytes; a question with its settings has a few thousand.
MAX_BODY_BYTES = 4_000_000
#: Largest upload in bytes: a few photographs.
MAX_UPLOAD_BYTES = 20_000_000
#: Bytes of all uploads in _UPLOADS_S seconds, about what is on the disk at a time.
MAX_UPLOADED_BYTES = 2_000_000_000
_UPLOADS_S = 24 * 3600
#: The browser loads nothing from other hosts and sends nothing there, whatever an answer says.
#: gradio's page has inline scripts and styles; its workers and downloads are blobs.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'"
)
_OTHER_HOST = (
    "this page is asked for under another name than {}; open it under one of these, or start it "
    "with --password WORD, or with --no-password where something else guards it"
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
)


class Guard:
    """ASGI middleware: adds security headers, refuses uploads and requests that are too large.

    Args:
        app: the application behind it.
        takes_pictures: let uploads in, as far as they are not too many.
        hosts: names that the ``Host`` header may carry, without port; None allows all. See
            listening.local_hosts.
    """

    def __init__(
        self, app: Any, *, takes_pictures: bool = False, hosts: Iterable[str] | None = None
    ) -> None:
        self.app = app
        self.takes_pictures = takes_pictures
        self.hosts = None if hosts is None else {host.lower() for host in hosts}
        self._uploads: deque[tuple[float, int]] = deque()  # (when, bytes)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        if self.hosts is not None and host_name(host) not in self.hosts:
            await _refuse(send, 403, _OTHER_HOST.format(sorted(self.hosts)).encode())
            return
        is_upload = scope["path"].rstrip("/").endswith("/upload")
        if is_upload and not self.takes_pictures:
            await _refuse(send, 403, b"this page takes no files")
            return
        limit, size = (MAX_UPLOAD_BYTES if is_upload else MAX_BODY_BYTES), 0

        async def counted() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            # Told as a client that left: what came so far is thrown away.
            return {"type": "http.disconnect"} if size > limit else message

        async def with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > limit:
            await _refuse(send, 413, b"the message is too long")
            return
        if is_upload and not self._has_room():
            await _refuse(send, 503, b"too many pictures today; try again tomorrow")
            return
        try:
            await self.app(scope, counted, with_headers)
        finally:
            if is_upload:
                self._uploads.append((time.monotonic(), size))

    def _has_room(self) -> bool:
        """Whether another upload may come: visitors must not fill the disk."""
        while self._uploads and self._uploads[0][0] < time.monotonic() - _UPLOADS_S:
            self._uploads.popleft()
        return sum(size for _, size in self._uploads) + MAX_UPLOAD_BYTES <= MAX_UPLOADED_BYTES


async def _refuse(send: Any, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *_HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
