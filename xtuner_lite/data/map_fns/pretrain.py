"""Plain text rows."""

from __future__ import annotations

from typing import Any

from xtuner_lite.data.messages import BadRow
from xtuner_lite.registry import MAP_FNS


@MAP_FNS.register_module(name="pretrain")
def pretrain_map_fn(row: dict[str, Any]) -> dict[str, Any]:
    """Plain text: every token is learnt, the end of each document included.

    Example row::

        {"text": "A document of any length."}
    """
    if not isinstance(row.get("text"), str):
        found = f"is {row['text']!r:.60}, not text" if "text" in row else "is missing"
        raise BadRow(f"'text' {found}; keys found: {', '.join(map(str, row)) or 'none'}")
    return {"text": row["text"]}
