"""What map functions share: a row's columns as text, and one question with its answer."""

from __future__ import annotations

from typing import Any

from xtuner_lite.data.messages import BadRow


def text(row: dict[str, Any], key: str) -> str:
    """The text under a key. Raises BadRow, with the keys found, if there is none."""
    value = row.get(key)
    if not isinstance(value, str):
        found = f"is {value!r:.60}, not text" if key in row else "is missing"
        raise BadRow(f"{key!r} {found}; keys found: {keys_of(row)}")
    return value


def optional_text(row: dict[str, Any], key: str) -> str:
    """The text under a key; '' if the key is missing or None. Raises BadRow for another type."""
    return "" if row.get(key) is None else text(row, key)


def keys_of(row: dict[str, Any]) -> str:
    """The row's keys, for messages."""
    return ", ".join(map(str, row)) or "none"


def exchange(question: str, answer: str, system: str | None = None) -> dict[str, Any]:
    """A conversation of one question and its answer; no system message if it is None or ''."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return {"messages": messages}
