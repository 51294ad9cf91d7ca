"""A sample as text, with what is learnt made visible."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from xtuner_lite.structures import IGNORE_INDEX

_LEARNT, _PLAIN, _RULE, _RESET = "\033[1;32m", "\033[90m", "\033[36m", "\033[0m"
_OPEN, _CLOSE = "[[", "]]"


def render_preview(
    sample: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    color: bool = True,
    max_tokens: int | None = 600,
) -> str:
    """The text of one dataset sample; learnt tokens green, or in [[ ]] without colour.

    Args:
        sample: what ``dataset[i]`` returns.
        tokenizer: turns the ids back into text, special tokens shown.
        color: ANSI colours.
        max_tokens: tokens shown; None shows all.

    Returns:
        Several lines: a head with the counts, then each segment under a rule with its row.
    """
    input_ids, labels = np.asarray(sample["input_ids"]), np.asarray(sample["labels"])
    learnt = labels != IGNORE_INDEX
    lengths = [int(length) for length in sample["lengths"]]
    marks = "learnt is green" if color else f"learnt stands in {_OPEN} {_CLOSE}"
    lines = [
        f"{len(input_ids)} tokens, {int(learnt.sum())} learnt ({learnt.mean():.0%}), "
        f"{len(lengths)} segment(s); {marks}"
    ]
    left = len(input_ids) if max_tokens is None else max_tokens
    start = 0
    for number, length in enumerate(lengths, start=1):
        if left <= 0:
            break
        row_ids = sample.get("row_ids") or []
        row = row_ids[number - 1] if number <= len(row_ids) else "?"
        counted = int(learnt[start : start + length].sum())
        rule = f"--- segment {number}/{len(lengths)}: {row}, {length} tokens, {counted} learnt ---"
        lines.append(f"{_RULE}{rule}{_RESET}" if color else rule)
        end = start + min(length, left)
        lines.append(_paint(input_ids[start:end], learnt[start:end], tokenizer, color))
        left -= end - start
        start += length
    hidden = len(input_ids) - min(len(input_ids), max_tokens or len(input_ids))
    if hidden:
        lines.append(f"... {hidden} more tokens")
    return "\n".join(lines)


def _paint(
    ids: np.ndarray, learnt: np.ndarray, tokenizer: PreTrainedTokenizerBase, color: bool
) -> str:
    pieces = []
    for is_learnt, run in _runs(ids, learnt):
        text = tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text = text.replace("\x1b", "\\x1b")  # data must not steer the terminal
        if not color:
            pieces.append(f"{_OPEN}{text}{_CLOSE}" if is_learnt else text)
            continue
        code = _LEARNT if is_learnt else _PLAIN
        # A colour that spans lines is lost in pagers: paint line by line.
        pieces.append(
            "\n".join(f"{code}{line}{_RESET}" if line else "" for line in text.split("\n"))
        )
    return "".join(pieces)


def _runs(ids: np.ndarray, learnt: np.ndarray) -> Iterator[tuple[bool, list[int]]]:
    """(learnt or not, ids) of each run of tokens of one kind."""
    borders = np.flatnonzero(np.diff(learnt)) + 1
    for run, kinds in zip(np.split(ids, borders), np.split(learnt, borders)):
        if len(run):
            yield bool(kinds[0]), run.tolist()
