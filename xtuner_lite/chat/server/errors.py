"""Errors in the form that OpenAI's clients read."""

from __future__ import annotations

import json
from typing import Any

from fastapi import HTTPException
from starlette.responses import Response


class ApiError(HTTPException):
    """What a request is refused with.

    Args:
        status: HTTP status.
        message: what was given, what is allowed, what to do.
        kind: OpenAI's ``type``.
        param: the field at fault, as ``messages[0].content``.
        code: OpenAI's ``code``, for programs.
        headers: HTTP headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.body: dict[str, Any] = {
            "error": {"message": message, "type": kind, "param": param, "code": code}
        }

    def response(self) -> Response:
        """The error as an HTTP answer. Its JSON is ASCII: what a request held may not be UTF-8."""
        return Response(
            json.dumps(self.body), self.status_code, self.headers, media_type="application/json"
        )


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be served as it stands (400)."""
    return ApiError(400, message, param=param, code=code)
