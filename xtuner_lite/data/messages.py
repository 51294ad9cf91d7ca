"""The message schema, and the two ways in which a row can fail to teach."""

from __future__ import annotations

import json
from typing import Any

from xtuner_lite.structures import ROLES, Message


class BadRow(ValueError):
    """A row that does not parse or breaks the schema. ``on_bad_row`` decides: raise or skip."""


class UnusableRow(ValueError):
    """A well-formed row that teaches nothing here (too long, no answer). Skipped and counted.

    Args:
        reason: what the ledger counts it under, the same words for every row of the kind.
        detail: this row's numbers, shown with the examples.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


def check_messages(messages: Any, *, images: bool = False) -> list[Message]:
    """Checks one conversation and returns it with its contents as plain strings.

    Roles need not alternate: that is the template's to allow or refuse.

    Args:
        messages: what a map function returned.
        images: allow image parts. A content that holds one comes back as a list of parts,
            {"type": "text", "text": str} or {"type": "image", "image": path, URL or image}; the
            other spellings of the field (image_url, url, path) are taken too.

    Raises:
        BadRow: not a list of messages; wrong types, unknown role, text that is not valid Unicode.
        UnusableRow: no message at all, or an assistant message that says nothing.
    """
    if not isinstance(messages, list):
        raise BadRow(
            f"messages is {_shown(messages)}, not a list; allowed: a list of role + content"
        )
    if not messages:
        raise UnusableRow("the conversation is empty")
    return [_check_message(message, index, images) for index, message in enumerate(messages)]


def _check_message(message: Any, index: int, images: bool) -> Message:
    if not isinstance(message, dict):
        raise BadRow(f"message {index} is {_shown(message)}, not an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise BadRow(f"message {index}: role is {_shown(role)}; allowed: {', '.join(ROLES)}")
    calls = message.get("tool_calls") or None
    content = message.get("content")
    if images and isinstance(content, list) and any(map(_is_image, content)):
        if role == "assistant":
            raise BadRow(f"message {index}: an assistant message holds an image; it writes text")
        content = [_check_part(part, index) for part in content]
    elif type(content) is not str or not content.isascii():
        content = _text_of(content, index, allow_none=calls is not None)
    if role == "assistant":
        if calls is not None:
            message = {**message, "tool_calls": _check_calls(calls, index)}
        elif not content.strip() and _teaches(message):
            raise UnusableRow("an assistant message is empty", f"message {index}")
    elif calls is not None:
        raise BadRow(f"message {index}: tool_calls in a {role} message; only the assistant calls")
    if len(message) > 2:
        _check_extras(message, index)
    if content is message.get("content"):
        return message  # type: ignore[return-value]
    return {**message, "content": content}  # type: ignore[typeddict-item,return-value]


def _teaches(message: dict[str, Any]) -> bool:
    return bool(message.get("loss", True)) and not message.get("reasoning_content")


def _text_of(content: Any, index: int, allow_none: bool) -> str:
    """A message's text from a string, None or a list of text parts."""
    if content is None and allow_none:
        return ""
    if isinstance(content, list):
        content = "".join(_part_text(part, index) for part in content)
    if not isinstance(content, str):
        raise BadRow(f"message {index}: content is {_shown(content)}; allowed: text, or text parts")
    check_text(content, f"message {index}: content")
    return str.__str__(content)


def _part_text(part: Any, index: int) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or part.get("type", "text") != "text":
        kind = part.get("type") if isinstance(part, dict) else part
        raise BadRow(
            f"message {index}: content part {_shown(kind)} is not text; images need a tokenizer "
            "that reads them: tokenizer=dict(type=load_processor, ...) or load_llava_processor"
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise BadRow(f"message {index}: a text part's text is {_shown(text)}, not a string")
    return text


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in ("image", "image_url")


def _check_part(part: Any, index: int) -> dict[str, Any]:
    """A text or image part in the one form that data sets of images read."""
    if not _is_image(part):
        text = _part_text(part, index)
        check_text(text, f"message {index}: content")
        return {"type": "text", "text": text}
    keys = ("image", "image_url", "url", "path")
    image = next((part[key] for key in keys if part.get(key) is not None), None)
    if isinstance(image, dict):  # OpenAI's {"image_url": {"url": ...}}
        image = image.get("url")
    if image is None or image == "" or isinstance(image, (bool, int, float, list)):
        raise BadRow(
            f"message {index}: image part {_shown(part)} names no image; allowed: "
            '{"type": "image", "image": path}'
        )
    if isinstance(image, str):
        check_text(image, f"message {index}: image")
    return {"type": "image", "image": image}


def check_text(text: str, what: str) -> None:
    """Raises BadRow if a string holds half of a surrogate pair, which no tokenizer can read."""
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(
            f"{what} holds a lone surrogate (U+{ord(text[error.start]):04X}) at character "
            f"{error.start}; it is not valid Unicode text"
        ) from error


def _check_extras(message: dict[str, Any], index: int) -> None:
    for key in ("reasoning_content", "name", "tool_call_id"):
        value = message.get(key)
        if value is None:
            continue
        if not isinstance(value, str):
            raise BadRow(f"message {index}: {key} is {_shown(value)}, not text")
        check_text(value, f"message {index}: {key}")
    if "loss" in message:
        loss = message["loss"]
        if not isinstance(loss, (bool, int, float)) or not 0 <= loss < float("inf"):
            raise BadRow(
                f"message {index}: loss is {_shown(loss)}; allowed: true, false or a weight "
                "from 0 up"
            )


def _check_calls(calls: Any, index: int) -> list[dict[str, Any]]:
    """Tool calls in the one form templates expect, with their arguments parsed.

    Raises:
        BadRow: no name, or arguments that are not a JSON object.
    """
    if not isinstance(calls, list):
        raise BadRow(f"message {index}: tool_calls is {_shown(calls)}, not a list")
    checked = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(f"message {index}: tool call {_shown(call)} has no function name")
        arguments = parse_json(
            function.get("arguments", {}), f"message {index}: arguments of {function['name']!r}"
        )
        if not isinstance(arguments, dict):
            raise BadRow(
                f"message {index}: arguments of {function['name']!r} are {_shown(arguments)}, "
                "not an object"
            )
        plain = {"name": function["name"], "arguments": arguments}
        check_plain(plain, f"message {index}: tool call")
        extra = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        checked.append({"type": "function", **extra, "function": plain})
    return checked


def check_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Tool schemas as OpenAI writes them, from a list or its JSON text; None if there are none.

    Bare schemas (name, description, parameters) are wrapped as functions.

    Raises:
        BadRow: not a list of schemas with names.
    """
    tools = parse_json(tools, "tools") if tools else None
    if not tools:
        return None
    if not isinstance(tools, list):
        raise BadRow(f"tools is {_shown(tools)}, not a list of function schemas")
    checked = []
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else tool
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(f"tools: {_shown(tool)} has no function name")
        check_plain(function, "tools")
        checked.append(tool if "function" in tool else {"type": "function", "function": tool})
    return checked


def parse_json(value: Any, what: str) -> Any:
    """``value`` itself, or what its JSON text says if it is a string. Raises BadRow."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{what}: not valid JSON: {error}") from error


def check_plain(value: Any, what: str) -> None:
    """Raises BadRow unless a value is plain JSON data (templates run in a sandbox made for it)."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(f"{what}: not plain JSON data: {error}") from error
    check_text(text, what)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
