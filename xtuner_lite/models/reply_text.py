"""From token ids to text, piece by piece: whole characters only, and nothing of a stop word.

Transformers' own StopStringCriteria is not used: it also matches across the end of the prompt,
walks the whole vocabulary for each new set of words (seconds for a large one), and leaves it to the
caller to keep the word out of the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for half of a character


class ReplyText:
    """The text of one reply as its tokens arrive.

    Args:
        tokenizer: decodes, without special tokens.
        stop_words: the reply ends before the first of them to be complete.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_words: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop_words = tuple(stop_words)
        self._ids: list[int] = []
        # Text is decoded from a few tokens before the new ones: a token's text may depend on its
        # neighbours (spaces, bytes of one character).
        self._start = self._read = 0
        self._held = ""  # decoded, and perhaps the beginning of a stop word
        self.is_stopped = False
        """Whether a stop word was met; tokens after it are ignored."""

    def push(self, token_id: int) -> str:
        """The text that is certain with this token; '' while a character or stop word may grow."""
        if self.is_stopped:
            return ""
        self._ids.append(token_id)
        before = self._decode(self._start, self._read)
        text = self._decode(self._start, len(self._ids))
        if len(text) <= len(before) or text.endswith(_UNFINISHED):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._release(text[len(before) :])

    def finish(self) -> str:
        """What was held back; nothing follows."""
        if self.is_stopped:
            return ""
        before = self._decode(self._start, self._read)
        text = self._release(self._decode(self._start, len(self._ids))[len(before) :])
        if not self.is_stopped:
            text, self._held = text + self._held, ""
        self._start = self._read = len(self._ids)
        return text

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)

    def _release(self, text: str) -> str:
        """Takes new text; returns what cannot be part of a stop word."""
        self._held += text
        found = [
            (at + len(word), at) for word in self._stop_words if (at := self._held.find(word)) >= 0
        ]
        if found:
            self.is_stopped = True
            # The one that is complete first, so that the cut does not depend on token borders.
            return self._held[: min(found)[1]]
        keep = max((_overlap(self._held, word) for word in self._stop_words), default=0)
        certain = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return certain


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``word``."""
    longest = min(len(text), len(word) - 1)
    return next((n for n in range(longest, 0, -1) if word.startswith(text[-n:])), 0)
