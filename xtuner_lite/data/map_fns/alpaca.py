"""Alpaca rows."""

from __future__ import annotations

from typing import Any

from xtuner_lite.data.map_fns.columns import exchange, optional_text, text
from xtuner_lite.data.messages import BadRow
from xtuner_lite.registry import MAP_FNS
from xtuner_lite.templates.system_prompts import system_prompt


@MAP_FNS.register_module(name="alpaca")
def alpaca_map_fn(row: dict[str, Any]) -> dict[str, Any]:
    """Alpaca rows: instruction, input and output; system and history are optional.

    The input stands on a line of its own behind the instruction.

    Example row::

        {"instruction": "Translate to French.", "input": "cheese", "output": "fromage",
         "system": "optional", "history": [["optional earlier question", "earlier answer"]]}
    """
    mapped = exchange(_question(row, "instruction", "input"), text(row, "output"))
    mapped["messages"][:0] = _history(row.get("history"))
    if system := optional_text(row, "system"):
        mapped["messages"].insert(0, {"role": "system", "content": system})
    return mapped


@MAP_FNS.register_module(name="alpaca_zh")
def alpaca_zh_map_fn(row: dict[str, Any]) -> dict[str, Any]:
    """Alpaca rows in Chinese columns: instruction_zh, input_zh and output_zh.

    Example row::

        {"instruction_zh": "翻译成法语。", "input_zh": "奶酪", "output_zh": "fromage"}
    """
    return exchange(_question(row, "instruction_zh", "input_zh"), text(row, "output_zh"))


@MAP_FNS.register_module(name="medical")
def medical_map_fn(
    row: dict[str, Any], *, system: str | None = system_prompt("medical")
) -> dict[str, Any]:
    """Medical questions (shibing624/medical): instruction, input, output; a doctor's prompt.

    ``dict(type="medical", system=None)`` leaves the system prompt out.

    Example row::

        {"instruction": "感冒发烧怎么办？", "input": "", "output": "多喝水，注意休息。"}
    """
    return exchange(_question(row, "instruction", "input"), text(row, "output"), system)


def _question(row: dict[str, Any], instruction: str, context: str) -> str:
    question, more = text(row, instruction), optional_text(row, context)
    return f"{question}\n{more}" if question and more else question or more


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
