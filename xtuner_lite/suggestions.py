"""Nearest right names for what a user misspelled."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names most like ``name``, best first; [] when none is near."""
    by_lower: dict[str, str] = {}
    for item in known:
        by_lower.setdefault(item.lower(), item)
    close = difflib.get_close_matches(name.lower(), by_lower, n=count, cutoff=0.6)
    return [by_lower[item] for item in close]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'a' or 'b'?", or '' when no known name is near."""
    names = nearest(name, known)
    return f"; did you mean {' or '.join(map(repr, names))}?" if names else ""


def is_slip_of(name: str, known: Iterable[str]) -> bool:
    """Whether ``name`` is one slip of the finger from a known name that it does not equal.

    One letter more, less or other, or two neighbours swapped; a different digit is no slip
    (load_in_4bit is not a misspelled load_in_8bit).
    """
    return any(_one_slip(name, item) for item in known if item != name)


def _one_slip(a: str, b: str) -> bool:
    if len(a) > len(b):
        a, b = b, a
    if len(b) - len(a) > 1 or len(b) < 3:
        return False
    start = 0
    while start < len(a) and a[start] == b[start]:
        start += 1
    if len(a) == len(b):
        differs = a[start], b[start]
        if any(letter.isdigit() for letter in differs):
            return False
        swapped = a[start : start + 2] == b[start : start + 2][::-1]
        return a[start + 1 :] == b[start + 1 :] or (swapped and a[start + 2 :] == b[start + 2 :])
    return a[start:] == b[start + 1 :] and not b[start].isdigit()
