"""Many prompts from a file, each answered by itself; the replies are JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner_lite.data.messages import BadRow, UnusableRow, check_messages
from xtuner_lite.data.readers import READERS, suffix_of
from xtuner_lite.structures import Message

if TYPE_CHECKING:
    from xtuner_lite.chat.session import ChatSession

SUFFIXES = (".txt", ".json", ".jsonl", ".ndjson")


class BatchError(ValueError):
    """The file of prompts, or the file for the replies, cannot be used."""

    exit_code = 2


@dataclass(frozen=True)
class BatchRow:
    """One prompt: the row as it stands in the file, and the conversation it means."""

    row: dict[str, Any]
    messages: list[Message]


def read_batch(path: Path) -> list[BatchRow]:
    """All prompts of a file: a line each (.txt), or rows with "prompt" or "messages" (JSON).

    Raises:
        BatchError: no such file, another type, or a row that is no prompt, with its line.
    """
    if not path.is_file():
        raise BatchError(f"no file of prompts {str(path)!r}; give a {', '.join(SUFFIXES)} file")
    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        raise BatchError(f"{path} ends with {suffix!r}; allowed: {', '.join(SUFFIXES)}")
    rows = []
    for line, data, error in READERS[suffix](path):
        try:
            if error is not None:
                raise BadRow(error)
            rows.append(_batch_row({"prompt": data["text"]} if suffix == ".txt" else data))
        except (BadRow, UnusableRow) as reason:
            raise BatchError(f"{path}:{line}: {reason}") from reason
    if not rows:
        raise BatchError(f"{path} holds no prompt; write one a line, or rows with a 'prompt'")
    return rows


def _batch_row(data: Any) -> BatchRow:
    if not isinstance(data, dict) or ("prompt" in data) == ("messages" in data):
        raise BadRow('a row is an object with either "prompt" or "messages"')
    if "messages" in data:
        messages = check_messages(data["messages"], images=True)  # which the model's turn refuses
        if messages[-1]["role"] == "assistant":
            raise BadRow("the last message is the assistant's; there is nothing to answer")
        return BatchRow(data, messages)
    if not isinstance(data["prompt"], str):
        raise BadRow(f'"prompt" is {data["prompt"]!r}; it must be text')
    return BatchRow(data, check_messages([{"role": "user", "content": data["prompt"]}]))


def answer_batch(session: ChatSession, rows: list[BatchRow]) -> Iterator[dict[str, Any]]:
    """Each row with its "reply", how it ended and its tokens; or with an "error" instead.

    Args:
        session: its model, sampling and system message are used; its history is not.
        rows: a system message of their own goes before the session's.
    """
    from xtuner_lite.models.generate import generate_reply
    from xtuner_lite.models.sampling import ReplyStats

    system: list[Message] = (
        [{"role": "system", "content": session.system}] if session.system else []
    )
    for row in rows:
        has_own = row.messages[0]["role"] == "system"
        stats = ReplyStats()
        try:
            reply = generate_reply(
                session.model,
                session.tokenizer,
                [*([] if has_own else system), *row.messages],
                stats=stats,
                **asdict(session.sampling),
            )
        except ValueError as error:  # one that is too long, or refused, is not the others' fault
            yield {**row.row, "error": str(error)}
        else:
            yield {**row.row, "reply": reply, **asdict(stats)}


def json_line(row: dict[str, Any]) -> str:
    """The row on one line."""
    return json.dumps(row, ensure_ascii=False)
