"""From learnt characters to learnt tokens: one tokenizer call for many conversations.

The text is tokenised whole. Where a token would straddle the border of a learnt span, the text is
cut at that border and tokenised in pieces: at generation time the prompt ends exactly there, so the
pieces are the tokens the model will see. No token is ever half learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from xtuner_lite.structures import IGNORE_INDEX
from xtuner_lite.templates.layout import Layout, Span, TemplateError
from xtuner_lite.templates.words import word_tokenizer


@dataclass(frozen=True)
class Encoded:
    """One conversation or document as tokens."""

    input_ids: np.ndarray
    """int32 [T]."""
    learnt: np.ndarray
    """bool [T], True where the token is a target; never the first token."""
    weights: np.ndarray | None
    """float32 [T], weight of each learnt token; None where all are 1."""
    eos_learnt: bool
    """Every learnt turn ends with a learnt end-of-turn or EOS token."""

    @property
    def labels(self) -> np.ndarray:
        """int32 [T]: the id where learnt, IGNORE_INDEX elsewhere. Not shifted."""
        return np.where(self.learnt, self.input_ids, np.int32(IGNORE_INDEX))

    def __len__(self) -> int:
        return len(self.input_ids)


def encode_layouts(tokenizer: PreTrainedTokenizerBase, layouts: Sequence[Layout]) -> list[Encoded]:
    """Tokenises rendered conversations and maps their learnt characters to tokens.

    Raises:
        TemplateError: the tokenizer gives no offsets and its pieces differ from the whole.
    """
    if not layouts:
        return []
    if not tokenizer.is_fast:
        return [_encode_in_pieces(tokenizer, layout) for layout in layouts]
    encoded = _encode_by_words(tokenizer, layouts)
    left = [index for index, done in enumerate(encoded) if done is None]
    if left:
        encodings = _backend_batch(tokenizer, [layouts[index].text for index in left])
        for index, encoding in zip(left, encodings):
            layout = layouts[index]
            bounds = _token_bounds(encoding, layout.spans, len(layout.text))
            if bounds is None:
                encoded[index] = _encode_cut(tokenizer, layout)
            else:
                encoded[index] = _finish(encoding.ids, bounds, layout)
    return [done for done in encoded if done is not None]


def _encode_by_words(
    tokenizer: PreTrainedTokenizerBase, layouts: Sequence[Layout]
) -> list[Encoded | None]:
    """The layouts that templates/words.py can encode; None for the others."""
    words = word_tokenizer(tokenizer)
    if words is None:
        return [None] * len(layouts)
    borders = [[at for span in layout.spans for at in (span.start, span.end)] for layout in layouts]
    results = words.encode([layout.text for layout in layouts], borders)
    encoded: list[Encoded | None] = []
    for layout, result in zip(layouts, results):
        if result is None:
            encoded.append(None)
        else:
            ids, marks = result
            encoded.append(_finish(ids, list(zip(marks[::2], marks[1::2])), layout))
    return encoded


def encode_text(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Encoded]:
    """Plain documents: all learnt, EOS appended and learnt, BOS where the tokenizer adds it.

    Raises:
        TemplateError: the tokenizer has no EOS token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise TemplateError(
            "the tokenizer has no EOS token, so documents would run into each other. "
            "Set tokenizer.eos_token, or use a tokenizer that has one."
        )
    if not texts:
        return []
    if tokenizer.is_fast:
        rows = _document_ids(tokenizer, texts)
    else:
        rows = [tokenizer(text)["input_ids"] for text in texts]
    encoded = []
    for ids in rows:
        array = np.array(ids if ids and ids[-1] == eos else [*ids, eos], dtype=np.int32)
        learnt = np.ones(len(array), dtype=bool)
        learnt[0] = False
        encoded.append(Encoded(array, learnt, None, eos_learnt=len(array) > 1))
    return encoded


def _document_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids with the special tokens that the tokenizer adds to a text."""
    words = word_tokenizer(tokenizer)
    frame = None if words is None else _frame(tokenizer)
    if words is None or frame is None:
        batch = _backend_batch(tokenizer, list(texts), add_special_tokens=True)
        return [encoding.ids for encoding in batch]
    results = words.encode(texts, [()] * len(texts))
    left = [index for index, result in enumerate(results) if result is None]
    batch = _backend_batch(tokenizer, [texts[i] for i in left], add_special_tokens=True)
    others = {index: encoding.ids for index, encoding in zip(left, batch)}
    head, tail = frame
    return [
        others[index] if result is None else [*head, *result[0], *tail]
        for index, result in enumerate(results)
    ]


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]] | None:
    """Special tokens before and behind any text, seen on a probe; None if it shows otherwise."""
    bare = _backend_batch(tokenizer, ["a", "b"])
    framed = _backend_batch(tokenizer, ["a", "b"], add_special_tokens=True)
    (a, b), (fa, fb) = ([e.ids for e in batch] for batch in (bare, framed))
    for start in range(len(fa) - len(a) + 1):
        head, tail = fa[:start], fa[start + len(a) :]
        if fa == [*head, *a, *tail] and fb == [*head, *b, *tail]:
            return head, tail
    return None


def _backend_batch(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], add_special_tokens: bool = False
) -> list[Any]:
    """The Rust tokenizer's encodings; skips the lists transformers builds from them."""
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:  # left over from a file or an earlier call
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    return backend.encode_batch(texts, add_special_tokens=add_special_tokens)


def _token_bounds(
    encoding: Any, spans: Sequence[Span], num_chars: int
) -> list[tuple[int, int]] | None:
    """Tokens [first, end) of each span; None if a token straddles a border."""
    num_tokens = len(encoding)
    bounds = []
    for span in spans:
        first = _token_at(encoding, span.start, num_chars, num_tokens)
        end = _token_at(encoding, span.end, num_chars, num_tokens)
        if first is None or end is None:
            return None
        bounds.append((first, end))
    return bounds


def _token_at(encoding: Any, char: int, num_chars: int, num_tokens: int) -> int | None:
    """The first token that starts at or behind ``char``; None if one reaches across it."""
    at = char
    while at < num_chars:  # characters that a normalizer drops belong to no token
        token = encoding.char_to_token(at)
        if token is not None:
            return token if encoding.token_to_chars(token)[0] >= char else None
        at += 1
    return num_tokens


def _finish(ids: list[int], bounds: list[tuple[int, int]], layout: Layout) -> Encoded:
    input_ids = np.array(ids, dtype=np.int32)
    learnt = np.zeros(len(ids), dtype=bool)
    weights = None
    if any(span.weight != 1.0 for span in layout.spans):
        weights = np.ones(len(ids), dtype=np.float32)
    for span, (first, end) in zip(layout.spans, bounds):
        learnt[first:end] = True
        if weights is not None:
            weights[first:end] = span.weight
    learnt[:1] = False  # nothing stands before the first token to predict it from
    return Encoded(input_ids, learnt, weights, eos_learnt=layout.ends_learnt)


def _encode_cut(tokenizer: PreTrainedTokenizerBase, layout: Layout) -> Encoded:
    """Tokenises piece by piece, cut at every border of a learnt span."""
    ids: list[int] = []
    bounds: list[tuple[int, int]] = []
    at = 0
    for span in layout.spans:
        ids += _piece_ids(tokenizer, layout.text[at : span.start], first=at == 0)
        first = len(ids)
        ids += _piece_ids(tokenizer, layout.text[span.start : span.end], first=span.start == 0)
        bounds.append((first, len(ids)))
        at = span.end
    ids += _piece_ids(tokenizer, layout.text[at:], first=at == 0)
    return _finish(ids, bounds, layout)


def _piece_ids(tokenizer: PreTrainedTokenizerBase, piece: str, first: bool) -> list[int]:
    """Ids of a piece from the middle of a text.

    SentencePiece puts a space before the first word of any string; encoding behind a newline that
    is taken off again avoids it (transformers does the same in ``encode_marked_chat``).
    """
    if not piece:
        return []
    if first:
        return list(tokenizer(piece, add_special_tokens=False)["input_ids"])
    newline = list(tokenizer("\n", add_special_tokens=False)["input_ids"])
    ids = list(tokenizer("\n" + piece, add_special_tokens=False)["input_ids"])
    if ids[: len(newline)] == newline:
        return ids[len(newline) :]
    return list(tokenizer(piece, add_special_tokens=False)["input_ids"])


def _encode_in_pieces(tokenizer: PreTrainedTokenizerBase, layout: Layout) -> Encoded:
    """For tokenizers without offsets: piece by piece, proved equal to the whole."""
    encoded = _encode_cut(tokenizer, layout)
    whole = tokenizer(layout.text, add_special_tokens=False)["input_ids"]
    if encoded.input_ids.tolist() != list(whole):
        raise TemplateError(
            f"{type(tokenizer).__name__} is a slow tokenizer (no character offsets), and its "
            "tokens of the pieces of a conversation differ from those of the whole, so the loss "
            "mask cannot be proved. Use the model's fast tokenizer (use_fast=True; tokenizer.json)."
        )
    return encoded
