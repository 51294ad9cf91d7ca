"""Alpaca rows."""

from __future__ import annotations

from typing import Any

from xtuner_lite.data.messages import BadRow
from xtuner_lite.registry import MAP_FNS


@MAP_FNS.register_module(name="alpaca")
def alpaca_map_fn(row: dict[str, Any]) -> dict[str, Any]:
    """Alpaca rows: instruction, input and output; system and history are optional.

    The input stands on a line of its own behind the instruction.

    Example row::

        {"instruction": "Translate to French.", "input": "cheese", "output": "fromage",
         "system": "optional", "history": [["earlier question", "earlier answer"]]}
    """
    question = _text(row, "instruction")
    context = row.get("input")
    if context is not None and not isinstance(context, str):
        raise BadRow(f"'input' is {context!r:.60}, not text")
    if context:
        question = f"{question}\n{context}" if question else context
    messages: list[dict[str, Any]] = []
    if row.get("system"):
        messages.append({"role": "system", "content": row["system"]})
    messages += _history(row.get("history"))
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": _text(row, "output")})
    return {"messages": messages}


def _text(row: dict[str, Any], key: str) -> str:
    if not isinstance(row.get(key), str):
        found = f"is {row[key]!r:.60}, not text" if key in row else "is missing"
        raise BadRow(f"{key!r} {found}; keys found: {', '.join(map(str, row)) or 'none'}")
    return row[key]


def _history(history: Any) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if history is not None and not isinstance(history, list):
        raise BadRow(f"'history' is {history!r:.60}, not a list of [question, answer]")
    for pair in history or []:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise BadRow(f"'history' holds {pair!r:.60}, not [question, answer]")
        messages.append({"role": "user", "content": pair[0]})
        messages.append({"role": "assistant", "content": pair[1]})
    return messages
