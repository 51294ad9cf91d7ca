"""Self-introduction data: questions and answers that teach a model its name and its author.

The texts stand in data/identity_texts.py. Rows that have nothing to do with the name are mixed in,
so that the model stays an ordinary assistant.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from typing import get_args

from xtuner_lite.data.identity_texts import GENERAL, IDENTITY, Language
from xtuner_lite.structures import Message

LANGUAGES: tuple[Language, ...] = get_args(Language)

#: Longest name or author accepted, in characters: it stands in every answer.
MAX_NAME_LENGTH = 80


class IdentityError(ValueError):
    """A name, author, number or language that cannot be used."""

    exit_code = 2  # a mistake of the user's, told without traceback


def build_identity_rows(
    name: str,
    author: str,
    n: int | None = None,
    languages: Sequence[Language] = LANGUAGES,
) -> list[dict[str, list[Message]]]:
    """Rows in OpenAI messages form that teach a model to introduce itself.

    The rows depend on the arguments alone: the same call always gives the same file.

    Args:
        name: what the model shall call itself, 1 to 80 characters on one line.
        author: who made it, 1 to 80 characters on one line.
        n: number of rows. None gives every question once (about 75 rows a language). More rows
            than that ask the same questions again with the next answer; pairs repeat only when
            every question has had every answer.
        languages: which of "en" and "zh" to write.

    Returns:
        ``[{"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}, ...]``

    Raises:
        IdentityError: name or author is empty, too long or has a line break or control character;
            n is below 1; languages is empty or holds an unknown one.
    """
    fills = {"name": _checked("name", name), "author": _checked("author", author)}
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise IdentityError(
            f"n={n!r}: the number of rows is a whole number from 1 up; leave it out for all"
        )
    unknown = [lang for lang in languages if lang not in LANGUAGES]
    if unknown or not languages:
        raise IdentityError(
            f"languages={list(languages)!r}: allowed are {' and '.join(map(repr, LANGUAGES))}; "
            "give at least one of them"
        )
    rounds = _rounds(tuple(dict.fromkeys(languages)))
    pairs = next(rounds)
    while n is not None and len(pairs) < n:
        pairs = pairs + next(rounds)
    return [
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": _fill(answer, fills)},
            ]
        }
        for question, answer in pairs[:n]
    ]


def _rounds(languages: tuple[Language, ...]) -> Iterator[list[tuple[str, str]]]:
    """Endless rounds; each holds every question once, shuffled by a fixed seed.

    In round r the i-th question of a topic gets answer i + r, so that the first round already shows
    every answer and the later ones vary them.
    """
    shuffler = random.Random(0)
    round_index = 0
    while True:
        pairs = [pair for language in languages for pair in GENERAL[language]]
        for topic in (topic for language in languages for topic in IDENTITY[language]):
            for index, question in enumerate(topic.questions):
                pairs.append((question, topic.answers[(index + round_index) % len(topic.answers)]))
        shuffler.shuffle(pairs)
        yield pairs
        round_index += 1


def _fill(text: str, fills: dict[str, str]) -> str:
    """Replaces {name} and {author} in one pass, so that a name with braces stays as it is."""
    return re.sub(r"\{(name|author)\}", lambda match: fills[match[1]], text)


def _checked(what: str, value: str) -> str:
    """The value without outer blanks; see :func:`build_identity_rows` for what is refused."""
    if not isinstance(value, str) or not value.strip():
        raise IdentityError(f"{what}={value!r}: the {what} is empty; give a text such as 'Ada'")
    value = value.strip()
    if not value.isprintable():
        raise IdentityError(
            f"{what}={value!r}: has a line break or control character; give it on one line of text"
        )
    if len(value) > MAX_NAME_LENGTH:
        raise IdentityError(
            f"{what} has {len(value)} characters, at most {MAX_NAME_LENGTH} are allowed: "
            "it stands in every answer; shorten it"
        )
    return value
