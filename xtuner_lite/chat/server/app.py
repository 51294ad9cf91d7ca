"""The HTTP application: routes, and errors in OpenAI's form."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse

from xtuner_lite.chat.server.answers import Answer, error_event, finish_reason
from xtuner_lite.chat.server.errors import ApiError, bad_request
from xtuner_lite.chat.server.gate import Gate
from xtuner_lite.chat.server.model import ServedModel
from xtuner_lite.chat.server.replies import LineFull, Reply, ReplyLine, ServerStops
from xtuner_lite.chat.server.request import ChatRequest, ReplyOrder, read_order
from xtuner_lite.chat.server.tool_calls import CallWatch, ToolCall
from xtuner_lite.version import __version__

logger = logging.getLogger(__name__)

#: What nginx calls it when the client left before the answer; nobody reads it.
_CLIENT_LEFT = 499

#: Fields of several types, and what may stand there.
_UNIONS = {
    "stop": "Input should be a text or a list of texts",
    "tool_choice": "Input should be 'auto' or 'none'",
}


def build_app(
    served: ServedModel,
    line: ReplyLine,
    *,
    api_key: str | None = None,
    max_request_bytes: int = 1 << 20,
    max_new_tokens: int | None = None,
    hosts: Iterable[str] | None = None,
) -> FastAPI:
    """The application.

    Args:
        served: the model.
        line: makes its replies.
        api_key: see Gate.
        max_request_bytes: see Gate.
        max_new_tokens: longest reply; None is what the context leaves.
        hosts: see Gate.
    """
    # No documentation pages: theirs fetch scripts from other hosts. /openapi.json stays.
    app = FastAPI(title="xtuner_lite", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, api_key=api_key, max_request_bytes=max_request_bytes, hosts=hosts)
    _add_error_handlers(app)
    listed = {"id": served.name, "object": "model", "created": served.created,
              "owned_by": "xtuner_lite"}  # fmt: skip

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": line.num_waiting}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [listed]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_name(name, served)
        return listed

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        _check_name(body.model, served)
        order = read_order(
            body,
            max_new_tokens=max_new_tokens or served.context,
            reads_images=served.reads_images,
        )
        _check_room(line)
        await asyncio.to_thread(served.check, order)
        options = body.stream_options
        answer = Answer(served.name, with_usage=bool(options and options.include_usage))
        reply = Reply(order.messages, order.tools, order.sampling)
        _join(line, reply)
        if body.stream:
            return _Stream(_chunks(answer, reply, order, served), line, reply)
        return await _whole(answer, reply, order, served, line, request)

    return app


def _check_name(name: str, served: ServedModel) -> None:
    if name != served.name:
        raise ApiError(
            404,
            f"the model {name!r} does not exist here; this server has {served.name!r}",
            param="model",
            code="model_not_found",
        )


def _check_room(line: ReplyLine) -> None:
    """Refuses a request before any work is done for it, where the line is full."""
    try:
        line.check_room()
    except (LineFull, ServerStops) as error:
        raise _refusal(error) from error


def _join(line: ReplyLine, reply: Reply) -> None:
    try:
        line.join(reply)
    except (LineFull, ServerStops) as error:
        raise _refusal(error) from error


def _refusal(error: Exception) -> ApiError:
    """What a client is told of a reply that was not made."""
    if isinstance(error, LineFull):
        wait = str(error.retry_after_s)
        return ApiError(
            503,
            f"too many requests wait already; try again in {wait} s",
            kind="server_error",
            code="server_busy",
            headers={"Retry-After": wait},
        )
    if isinstance(error, ServerStops):
        return ApiError(503, str(error), kind="server_error", code="server_stops")
    return ApiError(
        500, "the reply failed; the server's log says why", kind="server_error", code="reply_failed"
    )


async def _whole(
    answer: Answer, reply: Reply, order: ReplyOrder, served: ServedModel, line: ReplyLine,
    request: Request,
) -> Response:  # fmt: skip
    """The answer at once, or nothing if the client leaves before."""
    making = asyncio.ensure_future(_collect(reply, order, served))
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({making, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not making.done():
            return Response(status_code=_CLIENT_LEFT)
        text, calls = making.result()
    except Exception as error:
        raise _refusal(error) from error
    finally:
        line.leave(reply)
        for task in (making, leaving):
            task.cancel()
        _log(reply)
    return JSONResponse(answer.whole(text, calls, reply.stats))


async def _left(request: Request) -> None:
    """Returns when the client has closed the connection. The body has been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _collect(
    reply: Reply, order: ReplyOrder, served: ServedModel
) -> tuple[str, list[ToolCall]]:
    parts: list[str] = []
    calls: list[ToolCall] = []
    async for piece in _read(reply, order, served):
        if isinstance(piece, str):
            parts.append(piece)
        else:
            calls = piece
    return "".join(parts), calls


async def _read(
    reply: Reply, order: ReplyOrder, served: ServedModel
) -> AsyncIterator[str | list[ToolCall]]:
    """The pieces of text, then the calls. One reading for streams and whole answers."""
    if order.tools is None or served.call_form is None:
        async for piece in reply.pieces():
            yield piece
        return
    watch = CallWatch(served.call_form, [tool["function"]["name"] for tool in order.tools])
    async for piece in reply.pieces():
        if certain := watch.push(piece):
            yield certain
    rest, calls = watch.finish()
    if rest:
        yield rest
    yield calls[: order.max_calls]


async def _chunks(
    answer: Answer, reply: Reply, order: ReplyOrder, served: ServedModel
) -> AsyncIterator[str]:
    yield answer.first_chunk()
    calls: list[ToolCall] = []
    try:
        async for piece in _read(reply, order, served):
            if isinstance(piece, str):
                yield answer.text_chunk(piece)
            else:
                calls = piece
    except Exception as error:  # the status is sent already: told as an event
        yield error_event(_refusal(error).body)
        return
    yield answer.last_chunks(calls, reply.stats)


class _Stream(StreamingResponse):
    """Server-sent events; the reply ends with the connection."""

    def __init__(self, chunks: AsyncIterator[str], line: ReplyLine, reply: Reply) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(chunks, headers=headers, media_type="text/event-stream")
        self._line = line
        self._reply = reply

    async def __call__(self, *scope_receive_send: Any) -> None:
        """Sends the stream."""
        try:
            await super().__call__(*scope_receive_send)
        finally:
            self._line.leave(self._reply)
            _log(self._reply)


def _log(reply: Reply) -> None:
    stats = reply.stats
    logger.info(
        "%d + %d tokens, %s",
        stats.prompt_tokens,
        stats.completion_tokens,
        finish_reason(stats, []) if stats.finish_reason not in (None, "cancelled") else "cut off",
    )


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def told(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def not_valid(request: Request, error: RequestValidationError) -> Response:
        return _told_of_body(error.errors()[0]).response()

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        paths = "/v1/chat/completions, /v1/models, /health"
        text = {404: f"no such path; there are {paths}", 405: "no such method on this path"}
        message = text.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message, headers=dict(error.headers or {})).response()

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        message = "the server failed; its log says why"
        return ApiError(500, message, kind="server_error").response()


def _told_of_body(problem: Any) -> ApiError:
    """pydantic's first finding, in OpenAI's form."""
    place = problem["loc"][1:]
    if place and place[0] in _UNIONS:
        place = place[:1]  # what follows is the name of a type
        problem = {**problem, "msg": _UNIONS[place[0]]}
    if problem["type"] == "json_invalid":
        return bad_request(f"the body is not valid JSON: {problem['ctx']['error']}")
    if not place:
        return bad_request(
            "the body must be a JSON object; send it with Content-Type: application/json"
        )
    param = str(place[0])
    for part in place[1:]:
        param += f"[{part}]" if isinstance(part, int) else f".{part}"
    if problem["type"] == "missing":
        return bad_request(f"{param} is missing; give it", param, "missing_required_parameter")
    given = repr(problem.get("input"))
    given = given if len(given) <= 60 else given[:57] + "..."
    return bad_request(f"{param} is {given}: {problem['msg']}", param, "invalid_value")
