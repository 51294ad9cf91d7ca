"""``map_fn='auto'``: recognises the format of a data set from its rows, and says why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

#: Rows looked at before a format is chosen.
NUM_LOOKED_AT = 200


@dataclass(frozen=True)
class Format:
    """How one source format is recognised."""

    map_fn: str
    """Registered map function."""
    signs: str
    """What a row must have, in words."""
    matches: Callable[[dict[str, Any]], bool]
    warning: str = ""
    """What to know before training on it; logged as a warning."""


class Recognised(NamedTuple):
    """The map function for a data set, why, and what to be warned of ('' for nothing)."""

    map_fn: str
    why: str
    warning: str


def _has(*keys: str) -> Callable[[dict[str, Any]], bool]:
    return lambda row: all(key in row for key in keys)


def _list_with(key: str, inner: str) -> Callable[[dict[str, Any]], bool]:
    def matches(row: dict[str, Any]) -> bool:
        items = row.get(key)
        return isinstance(items, list) and any(isinstance(i, dict) and inner in i for i in items)

    return matches


def _has_label(row: dict[str, Any]) -> bool:
    label = row.get("label", row.get("kto_tag"))
    judged = ("messages", "conversations", "completion")
    return isinstance(label, bool) and any(key in row for key in judged)


def _is_llava(row: dict[str, Any]) -> bool:
    return ("image" in row or "images" in row) and _list_with("conversations", "from")(row)


def _is_oasst1(row: dict[str, Any]) -> bool:
    return isinstance(row.get("text"), str) and row["text"].lstrip().startswith("### Human:")


def _is_question_answer(row: dict[str, Any]) -> bool:
    """A context beside them belongs to the question: such rows are for a function that says how."""
    pairs = (("question", "answer"), ("question", "response"), ("prompt", "response"))
    return "context" not in row and any(_has(*pair)(row) for pair in pairs)


#: Tried in order; the first that matches a row is its format.
FORMATS: dict[str, Format] = {
    "preference pairs": Format(
        "chosen",
        "'chosen' and 'rejected'",
        _has("chosen", "rejected"),
        "plain fine-tuning learns the CHOSEN answers and never sees the rejected ones; comparing "
        "them is preference training (map_fn='preference')",
    ),
    "unpaired labels": Format(
        "desirable",
        "'messages', 'conversations' or 'completion' with a true/false 'label'",
        _has_label,
        "plain fine-tuning learns the answers labelled TRUE and SKIPS the rows labelled false (the "
        "ledger counts them); learning from both is training on labels (map_fn='unpaired')",
    ),
    "moss": Format(
        "moss",
        "'chat' with 'turn_1' in it",
        lambda row: isinstance(row.get("chat"), dict) and "turn_1" in row["chat"],
    ),
    "llava": Format("llava", "'conversations' with 'from' in them and 'image'", _is_llava),
    "openai": Format("openai", "'messages' with 'role' in them", _list_with("messages", "role")),
    "sharegpt": Format(
        "sharegpt", "'conversations' with 'from' in them", _list_with("conversations", "from")
    ),
    "alpaca": Format("alpaca", "'instruction' and 'output'", _has("instruction", "output")),
    "alpaca_zh": Format(
        "alpaca_zh", "'instruction_zh' and 'output_zh'", _has("instruction_zh", "output_zh")
    ),
    "openorca": Format(
        "openorca",
        "'system_prompt', 'question' and 'response'",
        _has("system_prompt", "question", "response"),
    ),
    "prompt_completion": Format(
        "prompt_completion", "'prompt' and 'completion'", _has("prompt", "completion")
    ),
    "question_answer": Format(
        "question_answer",
        "'question' with 'answer' or 'response', or 'prompt' with 'response'",
        _is_question_answer,
    ),
    "default": Format("default", "'input' and 'output'", _has("input", "output")),
    "oasst1": Format("oasst1", "'text' that starts with '### Human:'", _is_oasst1),
    "pretrain": Format("pretrain", "'text'", _has("text")),
}


def format_of(row: Any) -> str | None:
    """Name of the first format in FORMATS that a row matches; None if it matches none."""
    if not isinstance(row, dict):
        return None
    return next((name for name, format_ in FORMATS.items() if format_.matches(row)), None)


def recognise(rows: Sequence[Any], source: str) -> Recognised:
    """The map function for the first rows of a data set.

    Args:
        rows: parsed rows; those of no known format are left to be counted as bad rows.
        source: name of the data set, for the messages.

    Returns:
        the map function, a sentence that says what was recognised and why, and a warning.

    Raises:
        ValueError: no known format, or several formats.
    """
    found = Counter(format_of(row) for row in rows)
    unknown = found.pop(None, 0)
    if len(found) != 1:
        what = "no known format" if not found else "several formats at once"
        counts = "".join(f" {count} x {name};" for name, count in found.most_common())
        unknown_rows = f" {unknown} of no known format;" if found and unknown else ""
        raise ValueError(
            f"{source}: map_fn='auto' sees {what} in the first {len(rows)} rows:{counts}"
            f"{unknown_rows}\n  keys found: {_keys(rows)}\n  formats known: {_known()}\n"
            "Name the map function (map_fn='alpaca', or a function of yours), or give the files "
            "of each format to a data set of its own."
        )
    name, count = found.most_common(1)[0]
    format_ = FORMATS[name]
    why = (
        f"{source}: recognised as {name!r}: {count} of the first {len(rows)} rows have "
        f"{format_.signs}"
    )
    if format_.map_fn != name:
        why += f"; read with map_fn={format_.map_fn!r}"
    warning = f"{source}: the rows are {name}: {format_.warning}" if format_.warning else ""
    return Recognised(format_.map_fn, why, warning)


def _keys(rows: Sequence[Any]) -> str:
    sets = Counter(
        ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__ for row in rows
    )
    shown = [f"[{keys}] in {count} rows" for keys, count in sets.most_common(5)]
    return "; ".join(shown) + ("; ..." if len(sets) > 5 else "")


def _known() -> str:
    return "; ".join(f"{f.map_fn} ({f.signs})" for f in FORMATS.values())
