"""Prompt and completion rows."""

from __future__ import annotations

from typing import Any

from xtuner_lite.data.map_fns.columns import keys_of
from xtuner_lite.data.messages import BadRow
from xtuner_lite.registry import MAP_FNS


@MAP_FNS.register_module(name="prompt_completion")
def prompt_completion_map_fn(row: dict[str, Any]) -> dict[str, Any]:
    """Prompt and completion, each a text or a list of messages; system is optional.

    Example row::

        {"prompt": "The capital of France?", "completion": "Paris.", "system": "optional"}
    """
    messages = _messages(row, "prompt", "user") + _messages(row, "completion", "assistant")
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": row["system"]})
    return {"messages": messages, "tools": row.get("tools")}


def _messages(row: dict[str, Any], key: str, role: str) -> list[Any]:
    value = row.get(key)
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list):
        return list(value)
    found = f"is {value!r:.60}, not text or messages" if key in row else "is missing"
    raise BadRow(f"{key!r} {found}; keys found: {keys_of(row)}")
