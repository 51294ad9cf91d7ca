"""Plain text rows."""

from __future__ import annotations

from typing import Any

from xtuner_lite.data.map_fns.columns import text
from xtuner_lite.registry import MAP_FNS


@MAP_FNS.register_module(name="pretrain")
def pretrain_map_fn(row: dict[str, Any]) -> dict[str, Any]:
    """Plain text: every token is learnt, the end of each document included.

    Example row::

        {"text": "A document of any length."}
    """
    return {"text": text(row, "text")}
