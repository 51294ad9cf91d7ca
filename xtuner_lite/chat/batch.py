"""Many prompts from a file, each answered by itself; the replies are JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner_lite.data.map_fns.llava import IMAGE_MARK, with_images
from xtuner_lite.data.messages import BadRow, UnusableRow, check_messages
from xtuner_lite.data.readers import READERS, suffix_of
from xtuner_lite.images.files import ImageError
from xtuner_lite.images.turns import local_name, user_turn
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

    Rows may have "images" (or "image"): paths from the file's folder, or data URIs, which stand
    where the texts have an <image> mark, before a prompt without marks. Messages may hold them as
    image parts, too. Only their names are looked at here.

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
            row = {"prompt": data["text"]} if suffix == ".txt" else data
            rows.append(_batch_row(row, path.absolute().parent))
        except (BadRow, UnusableRow, ImageError) as reason:
            raise BatchError(f"{path}:{line}: {reason}") from reason
    if not rows:
        raise BatchError(f"{path} holds no prompt; write one a line, or rows with a 'prompt'")
    return rows


def _batch_row(data: Any, folder: Path) -> BatchRow:
    if not isinstance(data, dict) or ("prompt" in data) == ("messages" in data):
        raise BadRow('a row is an object with either "prompt" or "messages"')
    if "messages" in data:
        asked = data["messages"]
        if isinstance(asked, list) and (images := _images(data)):
            asked = with_images(asked, images)
        messages = check_messages(asked, images=True)  # which a model of text refuses in its turn
        if messages[-1]["role"] == "assistant":
            raise BadRow("the last message is the assistant's; there is nothing to answer")
        return BatchRow(data, [_placed(message, folder) for message in messages])
    prompt, images = data["prompt"], _images(data)
    if not isinstance(prompt, str):
        raise BadRow(f'"prompt" is {prompt!r}; it must be text')
    if images and IMAGE_MARK in prompt:
        asked = with_images([{"role": "user", "content": prompt}], images)
    else:
        asked = [user_turn(prompt, images)]
    return BatchRow(data, [_placed(m, folder) for m in check_messages(asked, images=True)])


def _images(data: dict[str, Any]) -> list[Any]:
    images = data.get("images") or data.get("image") or []
    return images if isinstance(images, list) else [images]


def _placed(message: Message, folder: Path) -> Message:
    """The message with its images' names as absolute paths."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    parts = []
    for part in content:
        if part["type"] == "image":
            if not isinstance(part["image"], str):
                raise BadRow(f"an image is {part['image']!r:.60}; it must be a path or a data URI")
            part = {**part, "image": local_name(part["image"], folder)}
        parts.append(part)
    return {**message, "content": parts}


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
