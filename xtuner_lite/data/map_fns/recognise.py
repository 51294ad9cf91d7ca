"""``map_fn='auto'``: recognises the format of a data set from its rows, and says why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

#: Rows looked at before a format is chosen.
NUM_LOOKED_AT = 200


@dataclass(frozen=True)
class Format:
    """How one source format is recognised."""

    map_fn: str | None
    """Registered map function; None: known, but not a data set for fine-tuning on answers."""
    signs: str
    """What a row must have, in words."""
    matches: Callable[[dict[str, Any]], bool]
    hint: str = ""


def _list_with(row: dict[str, Any], key: str, inner: str) -> bool:
    items = row.get(key)
    return isinstance(items, list) and any(isinstance(i, dict) and inner in i for i in items)


#: Tried in order; the first that matches a row is its format.
FORMATS: dict[str, Format] = {
    "preference pairs": Format(
        None,
        "'chosen' and 'rejected'",
        lambda row: "chosen" in row and "rejected" in row,
        "they are for preference training (DPO), not for ChatDataset",
    ),
    "unpaired labels": Format(
        None,
        "'messages' or 'completion' with a true/false 'label'",
        lambda row: (
            isinstance(row.get("label"), bool) and ("messages" in row or "completion" in row)
        ),
        "they are for training on labels (KTO); some answers are marked as bad",
    ),
    "openai": Format(
        "openai", "'messages' with 'role' in them", lambda row: _list_with(row, "messages", "role")
    ),
    "sharegpt": Format(
        "sharegpt",
        "'conversations' with 'from' in them",
        lambda row: _list_with(row, "conversations", "from"),
    ),
    "alpaca": Format(
        "alpaca",
        "'instruction' and 'output'",
        lambda row: "instruction" in row and "output" in row,
    ),
    "prompt_completion": Format(
        "prompt_completion",
        "'prompt' and 'completion'",
        lambda row: "prompt" in row and "completion" in row,
    ),
    "pretrain": Format("pretrain", "'text'", lambda row: "text" in row),
}


def format_of(row: Any) -> str | None:
    """Name of the first format in FORMATS that a row matches; None if it matches none."""
    if not isinstance(row, dict):
        return None
    return next((name for name, format_ in FORMATS.items() if format_.matches(row)), None)


def recognise(rows: Sequence[Any], source: str) -> tuple[str, str]:
    """The map function for the first rows of a data set.

    Args:
        rows: parsed rows; those of no known format are left to be counted as bad rows.
        source: name of the data set, for the messages.

    Returns:
        (map function, a sentence that says what was recognised and why).

    Raises:
        ValueError: no known format, several formats, or one that is not for fine-tuning.
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
    if format_.map_fn is None:
        raise ValueError(
            f"{source}: the rows are {name} (they have {format_.signs}): {format_.hint}. "
            "Name the map function (map_fn=...) if you want to train on them all the same."
        )
    why = f"{source}: recognised as {name!r}: {count} of the first {len(rows)} rows have "
    return format_.map_fn, why + format_.signs


def _keys(rows: Sequence[Any]) -> str:
    sets = Counter(
        ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__ for row in rows
    )
    shown = [f"[{keys}] in {count} rows" for keys, count in sets.most_common(5)]
    return "; ".join(shown) + ("; ..." if len(sets) > 5 else "")


def _known() -> str:
    return "; ".join(f"{f.map_fn} ({f.signs})" for f in FORMATS.values() if f.map_fn)
