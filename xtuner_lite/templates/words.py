"""Tokenises text word by word, from a dict: the same ids as the tokenizer's, ten times sooner.

A byte-level BPE tokenizer cuts a text at its added tokens, cuts the rest into words with a regular
expression, and encodes each word by itself. So the ids of a text are the ids of its words, and most
words have been seen before. Here the first two cuts are made by Python's ``re`` and the ids are
looked up; a word that is new is encoded by the tokenizer itself. So is, as one long word, whatever
holds a character beyond ASCII, because ``re`` and the tokenizer may know other letters; and so is
every text of a tokenizer of another kind.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

#: Words remembered at most, some 40 MB; then the dict starts anew.
MAX_WORDS = 200_000

# Character classes of the patterns, as ranges within ASCII.
_CLASSES = {
    r"\p{L}": "A-Za-z", r"\p{N}": "0-9", r"\s": r"\t-\r ", r"\p{Lu}": "A-Z", r"\p{Ll}": "a-z",
    r"\p{Lt}": "", r"\p{Lm}": "", r"\p{Lo}": "", r"\p{M}": "", r"\r": r"\r", r"\n": r"\n",
    "\r": r"\r", "\n": r"\n",
}  # fmt: skip
_PIECE = re.compile(r"\\p\{\w+\}|\\.|[\s\S]")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Cut by both sides when a WordTokenizer is made: every ASCII character beside every kind of
# neighbour, runs of blanks, contractions in both cases.
_NEIGHBOURS = ("", " ", "  ", "\n", "\r\n", "\t ", "a", "Zz", "7", "1234", ".", "'", "'S", "'re")
_PROBE = "".join(f"{n}{chr(c)}{n}{chr(c)}" for c in range(128) for n in _NEIGHBOURS) + " \n  \n "


# Between a letter or digit and a blank with a letter behind it every pattern makes a cut (that it
# does is probed), and what stands before has no influence on what comes behind.
_SAFE = re.compile(r"(?<=[A-Za-z0-9])(?= [A-Za-z])")
_LAST_SAFE = re.compile(r"[\s\S]*[A-Za-z0-9](?= [A-Za-z])")
_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]+")


class WordTokenizer:
    """Ids of texts from the ids of their words. Made by :func:`word_tokenizer`."""

    def __init__(self, backend: Any, stages: Sequence[re.Pattern[str]]) -> None:
        self._backend = backend
        self._stages = stages
        self._ids: dict[str, tuple[int, ...]] = {}
        added = {token.content: i for i, token in backend.get_added_tokens_decoder().items()}
        self._added = {content: (i,) for content, i in added.items()}
        longest_first = sorted(filter(None, added), key=len, reverse=True)
        self._added_pattern = (
            re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if added else None
        )

    def encode(
        self, texts: Sequence[str], borders: Sequence[Sequence[int]]
    ) -> list[tuple[list[int], list[int]] | None]:
        """Token ids of each text, without the special tokens that a post-processor would add.

        Args:
            texts: N texts.
            borders: for each, positions (characters, ascending) that must fall between tokens.

        Returns:
            N pairs (ids, for each border the number of tokens before it); None for a text that
            has a word across a border: the tokenizer itself must encode that.
        """
        cuts = [self._words(text, marks) for text, marks in zip(texts, borders)]
        self._learn(chain.from_iterable(cut[0] for cut in cuts if cut is not None))
        known = self._ids
        results: list[tuple[list[int], list[int]] | None] = []
        for cut in cuts:
            if cut is None:
                results.append(None)
                continue
            words, marks = cut
            pieces = [known[word] for word in words]
            ids: list[int] = []
            ends, at = [], 0
            for mark in marks:
                ids += chain.from_iterable(pieces[at:mark])
                ends.append(len(ids))
                at = mark
            ids += chain.from_iterable(pieces[at:])
            results.append((ids, ends))
        return results

    def split(self, text: str) -> list[str]:
        """The words of a text without added tokens."""
        if not text.isascii():
            return self._split_around(text)
        words = self._stages[0].findall(text)
        for stage in self._stages[1:]:
            words = [word for piece in words for word in stage.findall(piece)]
        return words

    def _split_around(self, text: str) -> list[str]:
        """The words of a text; each stretch that holds characters beyond ASCII is one."""
        words: list[str] = []
        at = 0
        while (found := _BEYOND_ASCII.search(text, at)) is not None:
            before = _LAST_SAFE.match(text, at, found.start())
            start = before.end() if before else at
            behind = _SAFE.search(text, found.end())
            end = behind.start() if behind else len(text)
            if start > at:
                words += self.split(text[at:start])
            words.append(text[start:end])
            at = end
        return words + self.split(text[at:]) if at < len(text) else words

    def _words(self, text: str, borders: Sequence[int]) -> tuple[list[str], list[int]] | None:
        """Words of the text, and how many of them stand before each border; None: one is cut."""
        parts = self._added_pattern.split(text) if self._added_pattern else [text]
        words: list[str] = []
        marks: list[int] = []
        waiting = iter(borders)
        border = next(waiting, None)
        start = 0
        for number, part in enumerate(parts):
            end = start + len(part)
            here = [part] if number % 2 else self.split(part) if part else []
            at, count = start, len(words)
            while border is not None and border <= end:
                for word in here[count - len(words) :]:
                    if at >= border:
                        break
                    at += len(word)
                    count += 1
                if at != border:
                    return None
                marks.append(count)
                border = next(waiting, None)
            words += here
            start = end
        return words, marks

    def _learn(self, words: Any) -> None:
        """Asks the tokenizer for the words that are new."""
        if not self._ids or len(self._ids) > MAX_WORDS:
            self._ids = dict(self._added)
        wanted = set(words)
        new = list(wanted.difference(self._ids))
        if len(self._ids) + len(new) > MAX_WORDS:
            self._ids = dict(self._added)
            new = list(wanted.difference(self._ids))
        for word, encoding in zip(new, self._backend.encode_batch(new, add_special_tokens=False)):
            self._ids[word] = tuple(encoding.ids)


_MADE: WeakKeyDictionary[Any, tuple[Any, WordTokenizer | None]] = WeakKeyDictionary()


def word_tokenizer(tokenizer: PreTrainedTokenizerBase) -> WordTokenizer | None:
    """The tokenizer's WordTokenizer; None if it is not of a kind that can be cut into words.

    Made once for each tokenizer, and again after tokens were added to it.
    """
    if not tokenizer.is_fast:
        return None
    backend = tokenizer.backend_tokenizer
    added = backend.get_added_tokens_decoder()
    state = (
        id(backend), backend.get_vocab_size(), backend.encode_special_tokens,
        tuple((i, str(token)) for i, token in added.items()),
        _state(backend.pre_tokenizer), _state(backend.normalizer),
    )  # fmt: skip
    made = _MADE.get(tokenizer)
    if made is None or made[0] != state:
        made = _MADE[tokenizer] = (state, _make(backend, added))
    return made[1]


def _make(backend: Any, added: dict[int, Any]) -> WordTokenizer | None:
    if backend.encode_special_tokens or type(backend.model).__name__ != "BPE":
        return None
    if backend.model.dropout:
        return None
    normalizer = json.loads(_state(backend.normalizer) or "null")
    if normalizer is not None and normalizer["type"] not in ("NFC", "NFKC"):  # ASCII stays ASCII
        return None
    if any(t.lstrip or t.rstrip or t.single_word or t.normalized for t in added.values()):
        return None
    stages = _stages(json.loads(_state(backend.pre_tokenizer) or "null"))
    if not stages:
        return None
    words = WordTokenizer(backend, stages)
    return words if _agrees(words, backend) else None


def _agrees(words: WordTokenizer, backend: Any) -> bool:
    """Whether both cut the probe at the same places and give it the same ids."""
    for probe in (_PROBE, _PROBE[::-1]):
        cut = words.split(probe)
        pieces = backend.pre_tokenizer.pre_tokenize_str(probe)
        ends = [end for _, (_, end) in pieces]
        if "".join(cut) != probe or ends != list(accumulate(map(len, cut))):
            return False
        if not {found.start() for found in _SAFE.finditer(probe)} <= set(ends):
            return False
        (mine,) = words.encode([probe], [[]])
        if mine is None or mine[0] != backend.encode(probe, add_special_tokens=False).ids:
            return False
    return True


def _state(part: Any) -> str:
    """A normalizer's or pre-tokenizer's settings as JSON; '' for none."""
    if part is None:
        return ""
    state = part.__getstate__()
    return state.decode() if isinstance(state, bytes) else str(state)


def _stages(pre_tokenizer: dict[str, Any] | None) -> list[re.Pattern[str]] | None:
    """One pattern for each cut the pre-tokenizer makes; None: it does something else."""
    parts = pre_tokenizer or {}
    steps = parts["pretokenizers"] if parts.get("type") == "Sequence" else [parts]
    stages: list[str | None] = []
    for step in steps:
        kind = step.get("type")
        if kind == "ByteLevel" and not step["add_prefix_space"]:
            if step.get("use_regex", True):
                stages.append(ascii_pattern(_GPT2))
        elif kind == "Digits":
            stages.append("[0-9]|[^0-9]+" if step["individual_digits"] else "[0-9]+|[^0-9]+")
        elif kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            stages.append(ascii_pattern(step["pattern"].get("Regex", "")))
        else:
            return None
    if not stages or not all(stages) or steps[-1].get("type") != "ByteLevel":
        return None
    return [re.compile(stage) for stage in stages if stage]


def ascii_pattern(pattern: str) -> str | None:
    """A tokenizer's pattern in the syntax of ``re``, the same on ASCII; None: not translatable."""
    translated, inside = [], False
    for piece in _PIECE.findall(pattern):
        if piece in _CLASSES:
            chars = _CLASSES[piece]
            translated.append(chars if inside else f"[{chars}]")
        elif piece == r"\S":
            if inside:
                return None
            translated.append(r"[^\t-\r ]")
        elif len(piece) > 1:
            return None
        else:
            inside = piece == "[" or (inside and piece != "]")
            translated.append(piece)
    joined = "".join(translated)
    if "[]" in joined or re.search(r"[+*?}]\+", joined):  # possessive: Python 3.11 and later
        return None
    return joined


__all__ = ["WordTokenizer", "ascii_pattern", "word_tokenizer"]
