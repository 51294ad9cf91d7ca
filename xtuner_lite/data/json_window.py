"""JSON values out of a file of any size: a window of text that moves along the file."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import IO, Any

from xtuner_lite.data.compressed import read_errors

RawRow = tuple[int, Any, "str | None"]

#: Bytes read at a time; a value larger than this makes the window grow.
BLOCK = 1 << 20
_BOM = b"\xef\xbb\xbf"
_SPACE = " \t\n\r"
_REST = "the rest of the array cannot be read"
# An error this near to the end of the window may only mean that the value goes on behind it.
_NEAR_END = 32


class BadJson(ValueError):
    """A value cannot be parsed; ``line`` is where."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


class JsonWindow:
    """Reads JSON values one after another from a UTF-8 file.

    Args:
        file: its bytes.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at = "", 0
        self._ended = False
        self._error: str | None = None  # why the file ended before its end
        self._line, self._line_start, self._counted = 1, 0, 0
        self._scan = json.JSONDecoder().raw_decode
        self._first = True

    def rest(self) -> str:
        """Everything from here on, read at once.

        Raises:
            BadJson: the file cannot be read to its end.
        """
        while not self._ended:
            self._more()
        if self._error is not None:
            raise BadJson(self._place(len(self._text))[0], self._error)
        return self._text[self._at :]

    def peek(self) -> str:
        """The next character that is no white space; '' at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._more()

    def skip(self) -> None:
        """Goes behind the character that ``peek`` showed."""
        self._at += 1

    @property
    def line(self) -> int:
        """1-based line of the next character."""
        return self._place(self._at)[0]

    @property
    def error(self) -> str | None:
        """Why nothing more can be read, once the readable part is used up."""
        return self._error

    def value(self) -> Any:
        """The value that starts here.

        Raises:
            BadJson: there is none.
        """
        while True:
            try:
                value, end = self._scan(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated")
                if not self._ended and (cut or error.pos > len(self._text) - _NEAR_END):
                    self._more()
                    continue
                if self._error is not None and error.pos > len(self._text) - _NEAR_END:
                    raise BadJson(self._place(len(self._text))[0], self._error) from error
                line, column = self._place(error.pos)
                raise BadJson(line, f"not valid JSON: {error.msg} at column {column}") from error
            except RecursionError as error:
                raise BadJson(self.line, "not valid JSON: nested too deeply") from error
            except ValueError as error:
                raise BadJson(self.line, f"not valid JSON: {error}") from error
            if end > len(self._text) - _NEAR_END and not self._ended:
                self._more()  # a number may go on
                continue
            self._at = end
            return value

    def _place(self, at: int) -> tuple[int, int]:
        """(line, column), both from 1, of a character at or behind the last one asked for."""
        if at < self._counted:  # an error in front of what was counted: only its line is needed
            return self._line - self._text.count("\n", at, self._counted), 1
        newlines = self._text.count("\n", self._counted, at)
        if newlines:
            self._line += newlines
            self._line_start = self._text.rindex("\n", self._counted, at) + 1
        self._counted = at
        return self._line, at - self._line_start + 1

    def _more(self) -> None:
        """Drops what lies behind and reads on; doubles the window where one value fills it."""
        self._place(self._at)
        self._text = self._text[self._at :]
        self._line_start -= self._at
        self._counted -= self._at
        self._at = 0
        try:
            data = self._file.read(max(BLOCK, len(self._text)))
        except read_errors() as error:
            self._end(f"the file cannot be read further: {error}")
            return
        if self._first:
            data, self._first = data.removeprefix(_BOM), False
        try:
            self._text += self._decode.decode(data, final=not data)
        except UnicodeDecodeError as error:
            self._text += error.object[: error.start].decode("utf-8")
            byte = error.object[error.start]
            self._end(f"not UTF-8 text: byte 0x{byte:02x}; the rest of the file cannot be read")
            return
        self._ended = not data

    def _end(self, error: str) -> None:
        self._ended, self._error = True, error


#: A position is a line, or a row's number above these bits and its line in them.
_LINE_BITS = 31


def show_position(position: int) -> str:
    """A row's position for people: '7', or '1 (row 7)' where rows share a line."""
    row, line = divmod(position, 1 << _LINE_BITS)
    return f"{line} (row {row})" if row else str(line)


def array_rows(window: JsonWindow) -> Iterator[RawRow]:
    """The elements of the array whose '[' was skipped, each with the line it starts on.

    One that starts on the same line as the one before it has its number too: see show_position.
    """
    if window.peek() == "]":
        return
    number = last = 0
    while True:
        window.peek()
        number += 1
        line = window.line if window.line != last else number << _LINE_BITS | last
        last = window.line
        try:
            value = window.value()
        except BadJson as error:
            yield line if error.line == last else error.line, None, f"{error}; {_REST}"
            return
        yield line, value, None
        found = window.peek()
        if found == "]":
            return
        if found != ",":
            what = repr(found) if found else "the end of the file"
            reason = f"not valid JSON: expected ',' or ']', found {what}"
            if not found and window.error:
                reason = window.error
            here = window.line if window.line != last else number + 1 << _LINE_BITS | last
            yield here, None, f"{reason}; {_REST}"
            return
        window.skip()


def value_rows(window: JsonWindow) -> Iterator[RawRow]:
    """A .json file that is no array: one value a line, or a single object over several lines."""
    first = window.line
    try:
        text = window.rest()
    except BadJson as error:
        yield error.line, None, str(error)
        return
    lines = [(number, line) for number, line in enumerate(text.split("\n"), first) if line.strip()]
    if len(lines) > 1:
        whole, error = parse(text)
        if error is None:
            yield lines[0][0], whole, None
            return
    for number, line in lines:
        yield number, *parse(line)


def parse(text: str) -> tuple[Any, str | None]:
    """(value, None), or (None, why the text is no JSON)."""
    try:
        return json.loads(text), None
    except json.JSONDecodeError as error:
        return None, f"not valid JSON: {error.msg} at column {error.colno}"
    except RecursionError:
        return None, "not valid JSON: nested too deeply"
    except ValueError as error:
        return None, f"not valid JSON: {error}"
