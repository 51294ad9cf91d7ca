"""ShareGPT rows, tools included."""

from __future__ import annotations

from typing import Any

from xtuner_lite.data.map_fns.columns import keys_of
from xtuner_lite.data.messages import BadRow, parse_json
from xtuner_lite.registry import MAP_FNS

#: Their word for a role -> ours.
ROLE_OF = {
    "human": "user", "user": "user", "prompter": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "model": "assistant",
    "system": "system",
    "function_call": "assistant", "tool_call": "assistant",
    "observation": "tool", "tool": "tool", "function_response": "tool",
}  # fmt: skip


@MAP_FNS.register_module(name=["sharegpt", "wizardlm"])
def sharegpt_map_fn(row: dict[str, Any]) -> dict[str, Any]:
    """ShareGPT rows: turns of from and value; function_call, observation and tools included.

    Example row::

        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}],
         "system": "optional", "tools": "[optional JSON list of function schemas]"}
    """
    turns = row.get("conversations")
    if not isinstance(turns, list):
        raise BadRow(f"no list under 'conversations'; keys found: {keys_of(row)}")
    messages = [sharegpt_message(turn, index) for index, turn in enumerate(turns)]
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": row["system"]})
    return {"messages": messages, "tools": row.get("tools")}


def sharegpt_message(turn: Any, index: int) -> dict[str, Any]:
    """One turn of from and value as a message. Raises BadRow."""
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise BadRow(f"turn {index} has no 'from' and 'value': {turn!r:.60}")
    speaker = turn["from"]
    role = ROLE_OF.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise BadRow(f"turn {index}: from is {speaker!r:.60}; allowed: {', '.join(ROLE_OF)}")
    if speaker in ("function_call", "tool_call"):
        calls = parse_json(turn["value"], f"turn {index}: {speaker}")
        calls = calls if isinstance(calls, list) else [calls]
        return {"role": role, "content": "", "tool_calls": calls}
    message = {"role": role, "content": turn["value"]}
    if turn.get("loss") is not None:
        message["loss"] = turn["loss"]
    return message
