"""What a template does with probes: conversations made only to see what it writes."""

from __future__ import annotations

from typing import Any

from xtuner_lite.templates.layout import Renderer, RowRefused

_MARK = "qzprobeqz"
_USER: Any = {"role": "user", "content": "probe"}
_ANSWER: Any = {"role": "assistant", "content": "answer"}


def _call(name: str, value: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": {"a": value}}
    calls = [{"type": "function", "id": "call00001", "function": function}]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _tools(name: str) -> list[dict[str, Any]]:
    schema = {"name": name, "description": "d", "parameters": {"type": "object"}}
    return [{"type": "function", "function": schema}]


def written_kinds(renderer: Renderer) -> dict[str, bool]:
    """Whether each kind of content appears in a render; True where the template refuses it."""
    result = {"role": "tool", "content": "r", "name": "f", "tool_call_id": "call00001"}
    probes: dict[str, tuple[list[Any], Any]] = {
        "user": ([{**_USER, "content": _MARK}, _ANSWER], None),
        "assistant": ([_USER, {**_ANSWER, "content": _MARK}], None),
        "system": ([{"role": "system", "content": _MARK}, _USER, _ANSWER], None),
        "tool_calls": ([_USER, _call(_MARK, 1), result, _ANSWER], None),
        "tool": ([_USER, _call("f", 1), {**result, "content": _MARK}, _ANSWER], None),
        "tools": ([_USER, _ANSWER], _tools(_MARK)),
        "thinking": ([_USER, {**_ANSWER, "reasoning_content": _MARK}], None),
    }
    return {kind: _writes(renderer, *probe) for kind, probe in probes.items()}


def _writes(renderer: Renderer, messages: list[Any], tools: Any) -> bool:
    try:
        return _MARK in renderer.render(messages, tools)
    except RowRefused:
        return True


def end_of_calls(renderer: Renderer) -> str:
    """What the template writes behind any tool call; '' if it writes none."""
    try:
        one, two = (
            renderer.render([_USER, _call("f", value)], _tools("f")) for value in ("Aone", "Btwo")
        )
    except RowRefused:
        return ""
    return common_suffix(one, two) if one != two else ""


def common_suffix(one: str, two: str) -> str:
    """The longest text that both end with."""
    size = 0
    while size < min(len(one), len(two)) and one[-1 - size] == two[-1 - size]:
        size += 1
    return one[len(one) - size :]
