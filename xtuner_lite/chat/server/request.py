"""A chat completion request: what is read, what is refused, and what it asks of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from xtuner_lite.chat.server.errors import bad_request
from xtuner_lite.chat.server.images import read_image_part
from xtuner_lite.data.messages import BadRow, check_messages, check_tools
from xtuner_lite.models.sampling import Sampling
from xtuner_lite.structures import Message
from xtuner_lite.suggestions import did_you_mean

#: Fields about the service, not the reply. They are ignored.
_HARMLESS = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_options", "prompt_cache_retention",
}  # fmt: skip

#: Fields that this server does not serve: the values that ask for nothing, and what to do instead.
_NOT_SERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "logprobs": ((False,), "log-probabilities are not given; leave it out"),
    "top_logprobs": ((0,), "log-probabilities are not given; leave it out"),
    "n": ((1,), "one answer a request; send the request that many times"),
    "frequency_penalty": ((0,), "repetition_penalty (above 1) is served instead"),
    "presence_penalty": ((0,), "repetition_penalty (above 1) is served instead"),
    "logit_bias": (({},), "leave it out"),
    "response_format": (({"type": "text"},), "only text; ask for JSON in the messages"),
    "modalities": ((["text"],), "only text"),
    "functions": (([],), "use tools"),
    "function_call": (("none",), "use tools and tool_choice"),
    "reasoning_effort": ((), "leave it out"),
    "verbosity": (("medium",), "ask for it in the messages"),
    "audio": ((), "only text"),
    "prediction": ((), "leave it out"),
    "web_search_options": ((), "leave it out"),
    "moderation": ((), "leave it out"),
}

_MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")
_PARTS = ("text", "refusal")
_WITH_IMAGES = "this model reads parts of type 'text' and 'image_url'"
#: (whether the model reads images, whether a user speaks) -> what may stand in the message.
_PARTS_OF = {
    (True, True): _WITH_IMAGES,
    (True, False): "images stand in user messages: send parts of type 'text'",
    (False, True): "this model reads text only: send parts of type 'text'",
    (False, False): "this model reads text only: send parts of type 'text'",
}


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # nothing to hide on this side of the line


class ChatRequest(BaseModel):
    """The body of ``POST /v1/chat/completions``.

    ``top_k`` and ``repetition_penalty`` are not OpenAI's; their client sends them as extra_body.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None


@dataclass(frozen=True)
class ReplyOrder:
    """What a request asks of the model, in this project's words."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    sampling: Sampling
    max_calls: int | None
    """Tool calls that the answer may hold; None is any number."""


def read_order(
    request: ChatRequest, *, max_new_tokens: int, reads_images: bool = False
) -> ReplyOrder:
    """What a request asks of the model.

    Args:
        request: the body.
        max_new_tokens: longest reply the server gives.
        reads_images: whether user messages may hold images, as data URIs.

    Raises:
        ApiError: (400) something in it cannot be served; the message says what to do.
    """
    _check_fields(request)
    messages = _read_messages(request.messages, reads_images)
    tools = _read_tools(request)
    sampling = Sampling(
        max_new_tokens=_read_limit(request, max_new_tokens),
        temperature=1.0 if request.temperature is None else request.temperature,  # OpenAI's default
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=request.top_k or 0,
        repetition_penalty=request.repetition_penalty or 1.0,
        seed=None if request.seed is None else request.seed % 2**63,
        stop_words=_read_stop(request.stop),
    )
    max_calls = 1 if request.parallel_tool_calls is False else None
    return ReplyOrder(messages, tools, sampling, max_calls)


def _check_fields(request: ChatRequest) -> None:
    """Refuses a field that would change the answer if it were served."""
    known = [*ChatRequest.model_fields, *_HARMLESS, *_NOT_SERVED]
    for name, value in (request.model_extra or {}).items():
        if name in _HARMLESS or value is None:
            continue
        if name not in _NOT_SERVED:
            hint = did_you_mean(name, known) or "; leave it out"
            raise bad_request(f"unknown field {name!r}{hint}", name, "unknown_parameter")
        neutral, advice = _NOT_SERVED[name]
        if not any(value == allowed and type(value) is not bool or value is allowed
                   for allowed in neutral):  # fmt: skip
            allowed = " or ".join(repr(value) for value in neutral)
            raise bad_request(
                f"{name} is {_shown(value)}; this server does not serve it"
                + (f" (allowed: {allowed})" if allowed else "")
                + f": {advice}",
                name,
                "unsupported_parameter",
            )
    if request.stream_options is not None and not request.stream:
        raise bad_request(
            "stream_options are given without stream; set stream to true, or leave them out",
            "stream_options",
        )


def _read_limit(request: ChatRequest, most: int) -> int:
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise bad_request(
            f"max_tokens is {old} and max_completion_tokens is {new}; they mean the same: give one",
            "max_tokens",
        )
    limit = new if old is None else old
    if limit is not None and limit > most:
        name = "max_completion_tokens" if old is None else "max_tokens"
        raise bad_request(f"{name} is {limit}; this server allows at most {most}", name)
    return limit or most


def _read_stop(stop: str | list[str] | None) -> tuple[str, ...]:
    words = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if not all(words):
        raise bad_request("stop holds an empty text; give texts of at least one character", "stop")
    return words


def _read_messages(given: list[dict[str, Any]], reads_images: bool) -> list[Message]:
    messages = []
    for index, message in enumerate(given):
        where = f"messages[{index}]"
        role = message.get("role")
        if role == "function":
            raise bad_request(
                "messages of the role 'function' are out of date; send role 'tool'", f"{where}.role"
            )
        for name, value in message.items():
            if name not in _MESSAGE_KEYS and value and name not in ("refusal", "annotations"):
                raise bad_request(
                    f"{where} holds {name!r}; allowed: {', '.join(_MESSAGE_KEYS)}",
                    f"{where}.{name}" if name.isidentifier() else where,
                    "unknown_parameter",
                )
        kept = {name: message[name] for name in _MESSAGE_KEYS if message.get(name) is not None}
        kept["content"] = _read_content(
            message.get("content"), where, _PARTS_OF[reads_images, role == "user"]
        )
        if role == "developer":  # OpenAI's newer word
            kept["role"] = "system"
        if role == "assistant":
            kept["loss"] = False  # an earlier answer may be empty; nothing is learnt here
        try:
            checked = check_messages([kept], images=reads_images)[0]
        except BadRow as error:
            text = str(error).replace("message 0", where)
            raise bad_request(text, where) from error
        checked.pop("loss", None)
        messages.append(checked)
    return messages


def _read_content(content: Any, where: str, readable: str) -> Any:
    """Text as it is; parts of text as one text; parts with images among them as parts."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return content
    parts: list[dict[str, Any]] = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image_url" and readable == _WITH_IMAGES:
            parts.append(read_image_part(part, f"{where}.content[{index}]"))
            continue
        text = part.get(kind) if kind in _PARTS else None
        if not isinstance(text, str):
            raise bad_request(
                f"{where}.content[{index}] is a part of type {_shown(kind)}; {readable}",
                f"{where}.content[{index}]",
                "unsupported_content",
            )
        parts.append({"type": "text", "text": text})
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _read_tools(request: ChatRequest) -> list[dict[str, Any]] | None:
    choice = request.tool_choice
    if choice is not None and choice not in ("none", "auto"):
        raise bad_request(
            f"tool_choice is {_shown(choice)}; allowed: 'auto', 'none'. A call cannot be forced; "
            "ask for it in the messages",
            "tool_choice",
            "unsupported_parameter",
        )
    if choice is not None and not request.tools:
        raise bad_request("tool_choice is given without tools; give tools", "tool_choice")
    for index, tool in enumerate(request.tools or []):
        if tool.get("type") != "function":
            raise bad_request(
                f"tools[{index}].type is {_shown(tool.get('type'))}; allowed: 'function'",
                f"tools[{index}].type",
            )
    try:
        tools = check_tools(request.tools)
    except BadRow as error:
        raise bad_request(str(error), "tools") from error
    return None if choice == "none" else tools


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
