"""OpenAssistant conversations written as one text."""

from __future__ import annotations

import re
from typing import Any

from xtuner_lite.data.map_fns.columns import text
from xtuner_lite.data.messages import BadRow
from xtuner_lite.registry import MAP_FNS

_TURN = re.compile(r"(?:\A|(?<=\S)|\n)\s*### ?(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@MAP_FNS.register_module(name="oasst1")
def oasst1_map_fn(row: dict[str, Any]) -> dict[str, Any]:
    """OpenAssistant (timdettmers/openassistant-guanaco): ### Human: and ### Assistant: in a text.

    Example row::

        {"text": "### Human: The capital of France?### Assistant: Paris."}
    """
    whole = text(row, "text").strip()
    front, *turns = _TURN.split(whole)
    if front.strip() or not turns:
        raise BadRow(f"'text' does not start with '### Human:': {whole!r:.60}")
    return {
        "messages": [
            {"role": _ROLES[speaker], "content": said.strip()}
            for speaker, said in zip(turns[::2], turns[1::2])
        ]
    }
