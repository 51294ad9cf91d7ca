"""What becomes of a row longer than max_length: cut at one end, or split into several pieces.

``split`` keeps every learnt token of a row and learns it exactly once:

* A conversation is split between its exchanges (a user's turn and all that answers it). Each piece
  is a conversation of its own, written by the template: the system prompt, the exchanges before it
  as context that is not learnt (up to a quarter of max_length, more in the last piece), its own.
* An exchange too long for itself, and plain text, become windows of tokens. A window of an answer
  starts with the tokens before it, a quarter of max_length, not learnt again; a window of a text
  with one token. BOS, where the row begins with it, begins each window.

The learnt tokens of the pieces are compared with those of the whole row. Where a template writes a
piece otherwise than it wrote the whole, the row is split into windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np

from xtuner_lite.structures import Message
from xtuner_lite.templates.adapter import ChatTemplate
from xtuner_lite.templates.layout import RowRefused, TemplateError, TrainOn, message_weights
from xtuner_lite.templates.tokenise import Encoded

Overlong = Literal["truncate", "truncate_left", "split", "drop", "raise"]
OVERLONG: tuple[str, ...] = ("truncate", "truncate_left", "split", "drop", "raise")

#: A later piece repeats at most max_length / this tokens of what stood before it.
CONTEXT_DIVISOR = 4


def keep_beginning(row: Encoded, limit: int) -> Encoded:
    """The first ``limit`` tokens."""
    ends = row.eos_learnt and not row.learnt[limit:].any()
    return _part(row, 0, limit, learnt_from=0, eos_learnt=ends)


def keep_end(row: Encoded, limit: int, bos_token_id: int | None = None) -> Encoded:
    """The last ``limit`` tokens, behind BOS if the row begins with it."""
    begin = len(row) - limit + _has_bos(row, bos_token_id)
    return _part(row, begin, len(row), learnt_from=begin + 1, bos_token_id=bos_token_id)


def split_tokens(
    row: Encoded, limit: int, *, context: int, bos_token_id: int | None = None
) -> list[Encoded]:
    """Windows of at most ``limit`` tokens that learn each learnt token of the row once.

    Args:
        row: at least one of its tokens is learnt.
        limit: tokens of a window.
        context: tokens before the first one learnt in a window, at least; fewer only where the row
            has fewer.
        bos_token_id: begins each window if it begins the row.
    """
    targets = np.flatnonzero(row.learnt)
    room = limit - _has_bos(row, bos_token_id)
    context = min(max(context, 1), room - 1)
    windows: list[Encoded] = []
    done = 0
    while done < len(targets):
        first = int(targets[done])
        end = min(len(row), first - min(first, context) + room)
        done = int(np.searchsorted(targets, end))
        if done < len(targets):
            end = int(targets[done - 1]) + 1  # what follows is the next window's context
        begin = max(0, end - room)
        windows.append(_part(row, begin, end, learnt_from=first, bos_token_id=bos_token_id))
    return windows


def split_exchanges(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: list[dict[str, Any]] | None,
    *,
    train_on: TrainOn,
    whole: Encoded,
    limit: int,
    train_thinking: bool = False,
) -> list[Encoded] | None:
    """Pieces that are conversations of their own; None if they would not teach what the row does.

    Args:
        messages, tools: the row.
        whole: the row as tokens; longer than ``limit``.
        limit: tokens of a piece.
    """
    if train_on == "all":  # also what the template writes between messages is learnt
        return None
    splitter = _ExchangeSplitter(template, messages, tools, train_on, limit, train_thinking)
    try:
        pieces = splitter.split()
    except (RowRefused, TemplateError):  # the whole was accepted; a piece of it is not
        return None
    return pieces if _teach_the_same(pieces, whole) else None


class _ExchangeSplitter:
    def __init__(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None,
        train_on: TrainOn,
        limit: int,
        train_thinking: bool,
    ) -> None:
        self.template, self.messages, self.tools, self.limit = template, messages, tools, limit
        self.train_thinking = train_thinking
        self.weights = message_weights(messages, train_on)
        self.num_head, self.borders = _exchanges(messages)
        self.head_is_learnt = any(self.weights[: self.num_head])

    def split(self) -> list[Encoded]:
        """The pieces, in order."""
        taught = [i for i, (a, b) in enumerate(self.borders) if any(self.weights[a:b])]
        if len(self.borders) < 2 or not taught or self.head_is_learnt:
            return []
        pieces: list[Encoded] = []
        at = taught[0]
        while True:
            end, more = self._piece(at, taught[-1])
            pieces += more
            if end == taught[-1]:
                return pieces
            at = next(i for i in taught if i > end)

    @cached_property
    def _sizes(self) -> list[int]:
        """Tokens of each exchange behind the head, alone."""
        alone = [(self._chosen(i, i, i), self.tools) for i in range(len(self.borders))]
        encoded = self.template.encode_batch(alone, train_thinking=self.train_thinking)
        return [len(one) for one in encoded]

    @cached_property
    def _added(self) -> list[int]:
        """Tokens that each exchange adds to others; an estimate, as tokens may join at borders."""
        head = self._sizes[0] + self._sizes[1] - len(self._encode(0, 0, 1))
        return [max(size - head, 1) for size in self._sizes]

    def _piece(self, at: int, last: int) -> tuple[int, list[Encoded]]:
        """(last exchange taken, its tokens), from exchange ``at`` on."""
        quarter, room = self.limit // CONTEXT_DIVISOR, self.limit - self._sizes[at]
        if room < 0:
            bos = self.template.tokenizer.bos_token_id
            alone = self._encode(at, at, at)
            return at, split_tokens(alone, self.limit, context=quarter, bos_token_id=bos)
        added, start, end = self._added, at, at
        left = min(room, quarter)
        while start > 0 and added[start - 1] <= left:
            start -= 1
            left -= added[start]
        left = room - sum(added[start:at])
        while end < last and added[end + 1] <= left:
            end += 1
            left -= added[end]
        while end == last and start > 0 and added[start - 1] <= left:  # nothing follows
            start -= 1
            left -= added[start]
        piece = self._encode(start, at, end)
        while len(piece) > self.limit:  # the estimate was short
            start, end = (start + 1, end) if start < at else (start, end - 1)
            piece = self._encode(start, at, end)
        return end, [piece]

    def _encode(self, start: int, at: int, end: int) -> Encoded:
        chosen = self._chosen(start, at, end)
        return self.template.encode(chosen, self.tools, train_thinking=self.train_thinking)

    def _chosen(self, start: int, at: int, end: int) -> list[Message]:
        """Exchanges start .. end behind the head; those before ``at`` are not learnt."""
        first, taught_from, stop = self.borders[start][0], self.borders[at][0], self.borders[end][1]
        chosen: list[Message] = [{**m, "loss": False} for m in self.messages[: self.num_head]]
        for index in range(first, stop):
            weight = self.weights[index] if index >= taught_from else False
            chosen.append({**self.messages[index], "loss": weight})
        return chosen


def _exchanges(messages: Sequence[Message]) -> tuple[int, list[tuple[int, int]]]:
    """(number of leading system messages, [first, end) of each exchange behind them)."""
    head = 0
    while head < len(messages) and messages[head]["role"] == "system":
        head += 1
    starts = [
        i
        for i in range(head, len(messages))
        if i == head or (messages[i]["role"] == "user" and messages[i - 1]["role"] != "user")
    ]
    return head, list(zip(starts, [*starts[1:], len(messages)]))


def _teach_the_same(pieces: list[Encoded], whole: Encoded) -> bool:
    """Whether the pieces' learnt tokens, one after the other, are those of the whole row."""
    if not pieces:
        return False
    learnt = np.concatenate([piece.input_ids[piece.learnt] for piece in pieces])
    weights = np.concatenate([_weights(piece)[piece.learnt] for piece in pieces])
    return np.array_equal(learnt, whole.input_ids[whole.learnt]) and np.array_equal(
        weights, _weights(whole)[whole.learnt]
    )


def _weights(row: Encoded) -> np.ndarray:
    return np.ones(len(row), dtype=np.float32) if row.weights is None else row.weights


def _has_bos(row: Encoded, bos_token_id: int | None) -> bool:
    return bos_token_id is not None and len(row) > 0 and int(row.input_ids[0]) == bos_token_id


def _part(
    row: Encoded,
    begin: int,
    end: int,
    *,
    learnt_from: int,
    bos_token_id: int | None = None,
    eos_learnt: bool | None = None,
) -> Encoded:
    """Tokens [begin, end) of a row, nothing before ``learnt_from`` learnt, BOS put before them."""
    learnt = row.learnt[begin:end].copy()
    learnt[: max(learnt_from - begin, 1)] = False
    input_ids = row.input_ids[begin:end]
    weights = None if row.weights is None else row.weights[begin:end]
    if begin > 0 and _has_bos(row, bos_token_id):
        input_ids = np.concatenate([row.input_ids[:1], input_ids])
        learnt = np.concatenate([[False], learnt])
        weights = None if weights is None else np.concatenate([[np.float32(1)], weights])
    return Encoded(input_ids, learnt, weights, row.eos_learnt if eos_learnt is None else eos_learnt)
