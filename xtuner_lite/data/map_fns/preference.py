"""Answers that were compared (chosen, rejected) or judged (label)."""

from __future__ import annotations

from typing import Any

from xtuner_lite.data.map_fns.columns import keys_of, optional_text
from xtuner_lite.data.map_fns.sharegpt import sharegpt_message
from xtuner_lite.data.messages import BadRow, UnusableRow
from xtuner_lite.registry import MAP_FNS

#: Where the prompt of a pair may stand, tried in order.
PROMPTS = ("conversations", "messages", "prompt", "question", "instruction", "input")


@MAP_FNS.register_module(name="preference")
def preference_map_fn(row: dict[str, Any]) -> dict[str, Any]:
    """Preference pairs: a prompt with a chosen and a rejected answer, for preference training.

    The prompt is a text or messages (prompt, question, conversations or messages; instruction with
    input); chosen and rejected are a text, a message, or messages with or without the prompt.
    Gives dict(chosen=messages, rejected=messages, tools=...), both with the prompt.

    Example row::

        {"conversations": [{"from": "human", "value": "The capital of France?"}],
         "chosen": {"from": "gpt", "value": "Paris."},
         "rejected": {"from": "gpt", "value": "Rome."}, "system": "optional"}
    """
    prompt = _prompt(row)
    return {
        "chosen": _with_answer(row, prompt, "chosen"),
        "rejected": _with_answer(row, prompt, "rejected"),
        "tools": row.get("tools"),
    }


@MAP_FNS.register_module(name="chosen")
def chosen_map_fn(row: dict[str, Any]) -> dict[str, Any]:
    """Preference pairs for plain fine-tuning: the chosen answer is learnt, the rejected never seen.

    Earlier answers are part of the prompt and are not learnt.

    Example row::

        {"prompt": "The capital of France?", "chosen": "Paris.", "rejected": "Rome."}
    """
    return {
        "messages": _last_learnt(preference_map_fn(row)["chosen"]),
        "tools": row.get("tools"),
    }


@MAP_FNS.register_module(name="unpaired")
def unpaired_map_fn(row: dict[str, Any]) -> dict[str, Any]:
    """Unpaired labels: a conversation and whether its last answer is good, for training on labels.

    Messages, conversations, or prompt and completion; the label is true or false. Gives
    dict(messages=..., label=bool, tools=...).

    Example row::

        {"messages": [{"role": "user", "content": "The capital of France?"},
                      {"role": "assistant", "content": "Paris."}], "label": True}
    """
    label = row.get("label", row.get("kto_tag"))
    if not isinstance(label, bool):
        raise BadRow(f"'label' is {label!r:.60}, not true or false; keys found: {keys_of(row)}")
    messages = _prompt(row)
    if "completion" in row:
        messages = _with_answer(row, messages, "completion")
    return {"messages": messages, "label": label, "tools": row.get("tools")}


@MAP_FNS.register_module(name="desirable")
def desirable_map_fn(row: dict[str, Any]) -> dict[str, Any]:
    """Unpaired labels for plain fine-tuning: rows labelled false are skipped and counted.

    Earlier answers are part of the prompt and are not learnt.

    Example row::

        {"prompt": "The capital of France?", "completion": "Paris.", "label": True}
    """
    mapped = unpaired_map_fn(row)
    if not mapped["label"]:
        raise UnusableRow("the answer is labelled as bad")
    return {"messages": _last_learnt(mapped["messages"]), "tools": mapped["tools"]}


def _prompt(row: dict[str, Any]) -> list[Any]:
    """The messages in front of the answers; [] if the answers carry them."""
    key = next((key for key in PROMPTS if row.get(key) is not None), None)
    messages = [] if key is None else _messages(row[key], key, "user")
    if key == "instruction" and (more := optional_text(row, "input")):
        messages = [{"role": "user", "content": f"{row[key]}\n{more}"}]
    if system := optional_text(row, "system"):
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _with_answer(row: dict[str, Any], prompt: list[Any], key: str) -> list[Any]:
    if key not in row:
        raise BadRow(f"{key!r} is missing; keys found: {keys_of(row)}")
    answer = _messages(row[key], key, "assistant")
    last = answer[-1] if answer else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        raise BadRow(f"{key!r} does not end with an answer of the assistant: {row[key]!r:.60}")
    repeated = [m for m in prompt if not (isinstance(m, dict) and m.get("role") == "system")]
    if repeated and answer[: len(repeated)] == repeated:
        answer = answer[len(repeated) :]
    if not prompt and len(answer) < 2:
        raise BadRow(f"no prompt, neither beside {key!r} nor in it; keys found: {keys_of(row)}")
    return prompt + answer


def _messages(value: Any, key: str, role: str) -> list[Any]:
    """Messages from a text, one message, or several, in OpenAI's or ShareGPT's words."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise BadRow(f"{key!r} is {value!r:.60}, not text or messages")
    return [
        sharegpt_message(m, i) if isinstance(m, dict) and "from" in m else m
        for i, m in enumerate(value)
    ]


def _last_learnt(messages: list[Any]) -> list[Any]:
    """The conversation with only its last answer learnt."""
    return [
        {**m, "loss": False} if isinstance(m, dict) and m.get("role") == "assistant" else m
        for m in messages[:-1]
    ] + messages[-1:]
