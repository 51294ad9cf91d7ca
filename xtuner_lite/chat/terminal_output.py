"""What a reply looks like in a terminal, in a pipe, and while it is awaited."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.status import Status

#: Everything that moves the cursor, changes colours or rings: a reply is text, not commands.
_CONTROLS = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {ord("\n"), ord("\t")})


class Waiting:
    """A spinner on stderr, if that is a terminal, until ``stop`` or the end of the block."""

    def __init__(self, text: str) -> None:
        self._status = _spinner(text)

    def __enter__(self) -> Waiting:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def update(self, text: str) -> None:
        """Shows another text beside the spinner."""
        if self._status is not None:
            self._status.update(text)

    def stop(self) -> None:
        """Takes the spinner away and leaves no trace of it."""
        if self._status is not None:
            self._status.stop()
            self._status = None


def _spinner(text: str) -> Status | None:
    if not sys.stderr.isatty():
        return None
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    return None if console.is_dumb_terminal else console.status(text, spinner="dots")


def print_reply(
    pieces: Generator[str, None, None], *, name: str | None = None, streamed: bool = True
) -> None:
    """Prints a reply and a line end.

    Args:
        pieces: closed at the end, also when Ctrl-C comes in between.
        name: of the speaker, printed in front ("bot> ").
        streamed: print each piece as it comes; False waits for all of them.
    """
    is_terminal = sys.stdout.isatty()
    head = f"{name}> " if name else ""
    with contextlib.closing(pieces), Waiting("thinking") as waiting:
        collected = pieces if streamed else ["".join(pieces)]
        for piece in collected:
            waiting.stop()
            print(head + (printable(piece) if is_terminal else piece), end="", flush=True)
            head = ""
        waiting.stop()
        print(head)


def printable(text: str) -> str:
    """The text without control characters, which a terminal would obey."""
    return text.translate(_CONTROLS)


def use_utf8() -> None:
    """Makes the standard streams UTF-8, whatever the locale; what cannot be read becomes U+FFFD."""
    for stream in (sys.stdin, sys.stdout):
        with contextlib.suppress(AttributeError):  # None, or a replacement for the real stream
            stream.reconfigure(encoding="utf-8", errors="replace")


def well_formed(text: str) -> str:
    """Text from the command line, with U+FFFD for bytes that are not UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def tell_unreadable(text: str) -> None:
    """Says so where ``text`` came with bytes that are not UTF-8."""
    if "\N{REPLACEMENT CHARACTER}" in text:
        print(
            "note: the input is not all UTF-8; what could not be read is now "
            "\N{REPLACEMENT CHARACTER}",
            file=sys.stderr,
        )
