"""From rows to tokens: map, check, render, tokenise, cut to length; every row is accounted for."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np

from xtuner_lite.data.image_rows import Named, flatten_images, join_images
from xtuner_lite.data.ledger import Ledger
from xtuner_lite.data.messages import (
    BadRow,
    UnusableRow,
    check_messages,
    check_text,
    check_tools,
)
from xtuner_lite.data.overlong import (
    CONTEXT_DIVISOR,
    Overlong,
    keep_beginning,
    keep_end,
    split_exchanges,
    split_tokens,
)
from xtuner_lite.data.row_images import RowImages, images_in_part
from xtuner_lite.data.sources import Row
from xtuner_lite.structures import Message
from xtuner_lite.templates.adapter import ChatTemplate
from xtuner_lite.templates.layout import Layout, RowRefused, TemplateError, TrainOn
from xtuner_lite.templates.tokenise import Encoded

OnBadRow = Literal["raise", "skip"]
ON_BAD_ROW: tuple[str, ...] = ("raise", "skip")

#: Where our own map functions stand.
_MAP_FNS = "xtuner_lite.data.map_fns."

MapFn = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass
class EncodedRows:
    """The kept rows of a chunk, in flat arrays, and the ledger of the chunk. R rows, T tokens.

    A row that was split (overlong="split") stands here as several rows of the same place.
    """

    input_ids: np.ndarray  # int32 [T]
    learnt: np.ndarray  # bool [T]
    weights: np.ndarray | None  # float32 [T]; None: all 1
    lengths: np.ndarray  # int64 [R]
    sources: list[str]  # names of the sources
    source: np.ndarray  # int32 [R], index into sources
    line: np.ndarray  # int64 [R]
    ledger: Ledger = field(default_factory=Ledger)
    # The images of the rows, see data/image_rows.py; None: no row has any.
    image_text: np.ndarray | None = None  # uint8
    image_ends: np.ndarray | None = None  # int64 [images]
    image_counts: np.ndarray | None = None  # int64 [R]


@dataclass(frozen=True)
class RowEncoder:
    """Encodes rows; holds the options, not the data. Can be pickled."""

    template: ChatTemplate | None
    """None: only plain text can be encoded."""
    encode_text: Callable[[Sequence[str]], list[Encoded]]
    map_fn: MapFn
    max_length: int | None = None
    """Tokens of a row; None: no limit."""
    overlong: Overlong = "truncate"
    train_on: TrainOn = "assistant"
    train_thinking: bool = False
    on_bad_row: OnBadRow = "raise"
    bos_token_id: int | None = None
    """Kept at the beginning of what is left of a row that starts with it."""
    row_images: RowImages | None = None
    """Finds the images of conversations; None: only text can be encoded."""

    def encode(self, rows: Sequence[Row]) -> EncodedRows:
        """Encodes a chunk of rows with one call of the tokenizer.

        Raises:
            ValueError: a bad row (on_bad_row="raise"), or an overlong one (overlong="raise").
            TemplateError: the template's mask cannot be proved on a row.
        """
        ledger = Ledger(rows_read=len(rows))
        chats: list[tuple[Row, _Chat]] = []
        texts: list[tuple[Row, str]] = []
        for row in rows:
            try:
                prepared = self._prepare(row)
            except UnusableRow as error:
                ledger.skip(error.reason, row.place, str(error))
                continue
            except TemplateError as error:
                raise TemplateError(f"{row.place}: {error}") from error
            except (BadRow, RowRefused) as error:
                self._bad(row, error, ledger)
                continue
            if isinstance(prepared, str):
                texts.append((row, prepared))
            else:
                chats.append((row, prepared))
        done: list[tuple[Row, _Chat | None, Encoded]] = []
        if self.template is not None:
            encoded = self.template.encode_layouts([chat.layout for _, chat in chats])
            done += [(row, chat, one) for (row, chat), one in zip(chats, encoded)]
        encoded = self.encode_text([text for _, text in texts])
        done += [(row, None, one) for (row, _), one in zip(texts, encoded)]
        if chats and texts:  # back into the order of the rows
            order = {id(row): index for index, row in enumerate(rows)}
            done.sort(key=lambda item: order[id(item[0])])
        return self._collect(done, ledger)

    def _bad(self, row: Row, error: Exception, ledger: Ledger) -> None:
        if self.on_bad_row == "skip":
            ledger.skip(getattr(error, "reason", "bad row"), row.place, str(error))
            return
        raise ValueError(
            f"{row.place}: {error}. Correct the row, or set on_bad_row='skip' to skip and count "
            "such rows."
        ) from error

    def _prepare(self, row: Row) -> _Chat | str:
        """The row as a rendered conversation or as plain text."""
        if row.error is not None:
            raise BadRow(row.error)
        if not isinstance(row.data, dict):
            raise BadRow(f"the row is {row.data!r:.60}, not an object with keys")
        mapped = self._mapped(row)
        if "text" in mapped:
            text = mapped["text"]
            if not isinstance(text, str):
                raise BadRow(f"text is {text!r:.60}, not a string")
            check_text(text, "text")
            if self.row_images is not None:
                self.row_images.check_text(text, "text")
            if not text.strip():
                raise UnusableRow("the text is empty")
            return text
        messages = check_messages(mapped["messages"], images=self.row_images is not None)
        if self.template is None:
            raise BadRow("a conversation, and this data set takes plain text only")
        tools = check_tools(mapped.get("tools"))
        images: list[Named] = []
        if self.row_images is not None:
            messages, images = self.row_images.find(messages)
            if not images:
                self._check_images_taken(row.data)
        layout = self.template.layout(messages, tools, self.train_on, self.train_thinking)
        if images:
            assert self.row_images is not None
            layout = self.row_images.expand(layout, images)
        elif self.row_images is not None:  # tool calls, reasoning and tools are written too
            self.row_images.check_text(layout.text, "what the template writes")
        return _Chat(messages, tools, layout, images)

    def _check_images_taken(self, row: dict[str, Any]) -> None:
        """Raises BadRow where one of our map functions has no place for a row's images."""
        function = self.map_fn.func if isinstance(self.map_fn, partial) else self.map_fn
        if not getattr(function, "__module__", "").startswith(_MAP_FNS):
            return  # a user's own may mean it
        for key in ("image", "images"):
            if row.get(key):
                name = getattr(function, "__name__", function)
                raise BadRow(
                    f"the row has {key}={row[key]!r:.60}, which map function {name} does not read, "
                    "so the model would never see it; use map_fn='llava' or 'openai', or a map "
                    "function of your own"
                )

    def _mapped(self, row: Row) -> dict[str, Any]:
        function = self.map_fn.func if isinstance(self.map_fn, partial) else self.map_fn
        name = getattr(function, "__name__", repr(function))
        try:
            mapped = self.map_fn(row.data)
        except (BadRow, UnusableRow):
            raise
        except Exception as error:  # a user's function may raise anything; the row is named
            raise BadRow(
                f"map function {name} raised {type(error).__name__}: {error}{_where(error)}"
            ) from error
        if not isinstance(mapped, dict) or not ("messages" in mapped or "text" in mapped):
            raise BadRow(
                f"map function {name} returned {mapped!r:.60}; it must return "
                "dict(messages=[...], tools=None) or dict(text=...)"
            )
        return mapped

    # ---------------------------------------------------------------- length

    def _collect(
        self, done: Iterable[tuple[Row, _Chat | None, Encoded]], ledger: Ledger
    ) -> EncodedRows:
        kept: list[tuple[Row, Encoded, list[Named]]] = []
        for row, chat, encoded in done:
            images = [] if chat is None else chat.images
            try:
                if images:
                    piece, images = self._fit_with_images(row, encoded, images)
                    pieces = [piece]
                else:
                    pieces = self._fit(row, chat, encoded)
            except UnusableRow as error:
                ledger.skip(error.reason, row.place, str(error))
                continue
            kept += [(row, piece, images) for piece in pieces]
            if chat is not None:
                ledger.show_images(len(images), len(chat.images) - len(images))
            eos_learnt = all(piece.eos_learnt for piece in pieces)
            ledger.keep(
                _counts(encoded),
                [_counts(piece) for piece in pieces],
                eos_learnt=eos_learnt,
                eos_cut=encoded.eos_learnt and not eos_learnt,
            )
            if chat is not None and self.template is not None:
                if chat.tools:
                    ledger.offer_tools(written=self.template.shows["tools"])
                if any(message.get("reasoning_content") for message in chat.messages):
                    ledger.show_thinking(written=self.template.shows["thinking"])
        return _flatten(kept, ledger)

    def _fit_with_images(
        self, row: Row, encoded: Encoded, images: list[Named]
    ) -> tuple[Encoded, list[Named]]:
        """The row and its images within max_length; an image is kept whole or not at all."""
        assert self.row_images is not None
        limit = self.max_length
        if limit is None or len(encoded) <= limit or self.overlong in ("raise", "drop"):
            return self._fit(row, None, encoded)[0], images
        if self.overlong == "split":
            raise ValueError(
                f"{row.place}: {len(encoded)} tokens with {len(images)} image(s), and max_length "
                f"is {limit}; a row with images cannot be split. Raise max_length, or set "
                "overlong='truncate', 'truncate_left' or 'drop'."
            )
        spans = self.row_images.spans(encoded.input_ids, images)
        left = self.overlong == "truncate_left"
        bos = int(left and int(encoded.input_ids[0]) == self.bos_token_id)  # stays in front
        limit, kept = images_in_part(spans, len(encoded), limit - bos, from_end=left)
        limit += bos
        if limit < 2:
            raise UnusableRow("no room for its image within max_length", f"{len(encoded)} tokens")
        piece = self._fit(row, None, encoded, limit)[0]
        return piece, [images[index] for index in kept]

    def _fit(
        self, row: Row, chat: _Chat | None, encoded: Encoded, limit: int | None = None
    ) -> list[Encoded]:
        """The row in pieces within max_length. Raises UnusableRow if no learnt token is left."""
        if not encoded.learnt.any():
            raise UnusableRow("nothing in it is learnt", "no assistant message counts")
        size, limit = len(encoded), self.max_length if limit is None else limit
        if limit is None or size <= limit:
            return [encoded]
        if self.overlong == "raise":
            raise ValueError(
                f"{row.place}: {size} tokens, and max_length is {limit}. Raise max_length, or set "
                "overlong='split', 'truncate' or 'drop'."
            )
        if self.overlong == "drop":
            raise UnusableRow("longer than max_length", f"{size} tokens, max_length {limit}")
        if self.overlong == "split":
            return self._split(chat, encoded, limit)
        if self.overlong == "truncate":
            piece = keep_beginning(encoded, limit)
        else:
            piece = keep_end(encoded, limit, self.bos_token_id)
        if not piece.learnt.any():
            raise UnusableRow("nothing learnt is left within max_length", self._why(encoded, limit))
        return [piece]

    def _split(self, chat: _Chat | None, encoded: Encoded, limit: int) -> list[Encoded]:
        if chat is None:
            return split_tokens(encoded, limit, context=1, bos_token_id=self.bos_token_id)
        assert self.template is not None
        pieces = split_exchanges(
            self.template,
            chat.messages,
            chat.tools,
            train_on=self.train_on,
            train_thinking=self.train_thinking,
            whole=encoded,
            limit=limit,
        )
        context = limit // CONTEXT_DIVISOR
        return pieces or split_tokens(
            encoded, limit, context=context, bos_token_id=self.bos_token_id
        )

    def _why(self, encoded: Encoded, limit: int) -> str:
        learnt = np.flatnonzero(encoded.learnt)
        if self.overlong == "truncate":
            return f"{learnt[0]} tokens stand before the first learnt one, max_length {limit}"
        behind = len(encoded) - int(learnt[-1]) - 1
        return f"{behind} tokens stand behind the last learnt one, max_length {limit}"


@dataclass(frozen=True)
class _Chat:
    """A row that is a conversation: checked, and rendered."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    layout: Layout
    images: list[Named] = field(default_factory=list)


def _counts(encoded: Encoded) -> tuple[int, int]:
    """(tokens, learnt tokens)."""
    return len(encoded), int(encoded.learnt.sum())


def _where(error: Exception) -> str:
    """The lines of a user's function that led to its error, outermost first; on one line."""
    frames = traceback.extract_tb(error.__traceback__)[1:][-3:]
    steps = [f"{f.filename}:{f.lineno} in {f.name}: {f.line}" for f in frames]
    return f" ({' -> '.join(steps)})" if steps else ""


def _flatten(kept: list[tuple[Row, Encoded, list[Named]]], ledger: Ledger) -> EncodedRows:
    sources: dict[str, int] = {}
    source = [sources.setdefault(row.source, len(sources)) for row, _, _ in kept]
    weights = None
    if any(encoded.weights is not None for _, encoded, _ in kept):
        weights = _joined([_weights(encoded) for _, encoded, _ in kept], np.float32)
    return EncodedRows(
        input_ids=_joined([encoded.input_ids for _, encoded, _ in kept], np.int32),
        learnt=_joined([encoded.learnt for _, encoded, _ in kept], np.bool_),
        weights=weights,
        lengths=np.array([len(encoded) for _, encoded, _ in kept], dtype=np.int64),
        sources=list(sources),
        source=np.array(source, dtype=np.int32),
        line=np.array([row.line for row, _, _ in kept], dtype=np.int64),
        ledger=ledger,
        **flatten_images([images for _, _, images in kept]),
    )


def _weights(encoded: Encoded) -> np.ndarray:
    if encoded.weights is not None:
        return encoded.weights
    return np.ones(len(encoded), dtype=np.float32)


def _joined(arrays: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=dtype)


def join_chunks(chunks: Iterable[EncodedRows], name: str) -> EncodedRows:
    """All chunks as one, with the sum of their ledgers."""
    parts = list(chunks)
    sources: dict[str, int] = {}
    for part in parts:
        for source in part.sources:
            sources.setdefault(source, len(sources))
    ledger = Ledger(name=name)
    for part in parts:
        ledger.add(part.ledger)
    weights = None
    if any(part.weights is not None for part in parts):
        weights = _joined(
            [
                np.ones(len(p.input_ids), np.float32) if p.weights is None else p.weights
                for p in parts
            ],
            np.float32,
        )
    remapped = [
        np.array([sources[s] for s in p.sources], dtype=np.int32)[p.source]
        for p in parts
        if p.sources
    ]
    return EncodedRows(
        input_ids=_joined([part.input_ids for part in parts], np.int32),
        learnt=_joined([part.learnt for part in parts], np.bool_),
        weights=weights,
        lengths=_joined([part.lengths for part in parts], np.int64),
        sources=list(sources),
        source=_joined(remapped, np.int32),
        line=_joined([part.line for part in parts], np.int64),
        ledger=ledger,
        **join_images(parts),
    )
