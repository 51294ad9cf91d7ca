"""Answers in OpenAI's words: a whole chat completion, or its chunks."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from xtuner_lite.chat.server.tool_calls import ToolCall
from xtuner_lite.models.sampling import ReplyStats


class Answer:
    """The answer to one request; its id, time and model are the same in each of its chunks.

    Args:
        model: the model's served name.
        with_usage: whether a stream ends with a chunk of token counts.
    """

    def __init__(self, model: str, *, with_usage: bool = False) -> None:
        self._with_usage = with_usage
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": None,
        }

    def whole(self, text: str, calls: list[ToolCall], stats: ReplyStats) -> dict[str, Any]:
        """The answer at once."""
        message: dict[str, Any] = {"role": "assistant", "content": text or None, "refusal": None}
        if calls:
            message["tool_calls"] = [call.as_openai() for call in calls]
        else:
            message["content"] = text
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": finish_reason(stats, calls),
        }
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": _usage(stats),
        }

    def first_chunk(self) -> str:
        """The chunk that says who speaks."""
        return self._chunk({"role": "assistant", "content": "", "refusal": None})

    def text_chunk(self, text: str) -> str:
        """A piece of text."""
        return self._chunk({"content": text})

    def last_chunks(self, calls: list[ToolCall], stats: ReplyStats) -> str:
        """The calls, how the reply ended, the token counts if they are wanted, and the mark."""
        chunks = [
            self._chunk({"tool_calls": [{"index": index, **call.as_openai()}]})
            for index, call in enumerate(calls)
        ]
        chunks.append(self._chunk({}, finish_reason(stats, calls)))
        if self._with_usage:
            chunks.append(_event({**self._chunk_head, "choices": [], "usage": _usage(stats)}))
        return "".join(chunks) + "data: [DONE]\n\n"

    @property
    def _chunk_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk"}

    def _chunk(self, delta: dict[str, Any], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        usage = {"usage": None} if self._with_usage else {}
        return _event({**self._chunk_head, "choices": [choice], **usage})


def error_event(body: dict[str, Any]) -> str:
    """An error in the middle of a stream, which clients raise."""
    return _event(body)


def finish_reason(stats: ReplyStats, calls: list[ToolCall]) -> str:
    """OpenAI's word for how a reply ended."""
    if calls:
        return "tool_calls"
    return "length" if stats.finish_reason == "length" else "stop"


def _usage(stats: ReplyStats) -> dict[str, int]:
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.completion_tokens,
        "total_tokens": stats.prompt_tokens + stats.completion_tokens,
    }


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
