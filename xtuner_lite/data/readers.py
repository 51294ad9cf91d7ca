"""One reader per file type: yields (line, data, error) for every row, bad ones included."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

RawRow = tuple[int, Any, "str | None"]

_BOM = b"\xef\xbb\xbf"
_SPACE = " \t\n\r"


def suffix_of(path: Path) -> str:
    """The file type's ending, without a '.gz' behind it: '.jsonl' for 'a.jsonl.gz'."""
    name = path.name.lower().removesuffix(".gz")
    return "." + name.rsplit(".", 1)[1] if "." in name else ""


def _open(path: Path) -> IO[bytes]:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    return path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, str, str | None]]:
    """(1-based number, text without its line end, error) of each line of a UTF-8 file."""
    number = 0
    with _open(path) as file:
        try:
            for number, raw in enumerate(file, start=1):
                if number == 1:
                    raw = raw.removeprefix(_BOM)
                try:
                    yield number, raw.decode("utf-8").rstrip("\r\n"), None
                except UnicodeDecodeError as error:
                    yield (
                        number,
                        "",
                        f"not UTF-8 text: byte 0x{raw[error.start]:02x} at {error.start}",
                    )
        except (gzip.BadGzipFile, EOFError, OSError) as error:
            yield number + 1, "", f"the file cannot be read further: {error}"


def read_jsonl(path: Path) -> Iterator[RawRow]:
    """One JSON value a line; blank lines are no rows."""
    for number, line, error in _lines(path):
        if error is not None:
            yield number, None, error
        elif line.strip():
            yield number, *_parse(line)


def _parse(text: str) -> tuple[Any, str | None]:
    try:
        return json.loads(text), None
    except json.JSONDecodeError as error:
        return None, f"not valid JSON: {error.msg} at column {error.colno}"
    except RecursionError:
        return None, "not valid JSON: nested too deeply"
    except ValueError as error:
        return None, f"not valid JSON: {error}"


def read_json(path: Path) -> Iterator[RawRow]:
    """A JSON array of rows, each with the line it starts on; or one JSON value a line."""
    with _open(path) as file:
        try:
            raw = file.read()
        except (gzip.BadGzipFile, EOFError, OSError) as error:
            yield 1, None, f"the file cannot be read: {error}"
            return
    try:
        text = raw.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        yield line, None, f"not UTF-8 text: byte 0x{raw[error.start]:02x}; no row of it was read"
        return
    del raw
    start = _skip_space(text, 0)
    if text[start : start + 1] == "[":
        yield from _array_rows(text, start + 1)
    else:
        yield from _value_rows(text)


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def _array_rows(text: str, at: int) -> Iterator[RawRow]:
    """Elements of an array, read one after another, so that each has its true line."""
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    at = _skip_space(text, at)
    if text[at : at + 1] == "]":
        return
    while True:
        line += text.count("\n", counted, at)
        counted = at
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            yield (
                error.lineno,
                None,
                f"not valid JSON: {error.msg} at column {error.colno}; {_REST}",
            )
            return
        except (RecursionError, ValueError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            yield line, None, f"not valid JSON: {reason}; {_REST}"
            return
        yield line, value, None
        at = _skip_space(text, at)
        if text[at : at + 1] == "]":
            return
        if text[at : at + 1] != ",":
            found = repr(text[at]) if at < len(text) else "the end of the file"
            here = text.count("\n", 0, at) + 1
            yield here, None, f"not valid JSON: expected ',' or ']', found {found}; {_REST}"
            return
        at = _skip_space(text, at + 1)


_REST = "the rest of the array cannot be read"


def _value_rows(text: str) -> Iterator[RawRow]:
    """A .json file that is no array: one value a line, or a single object over several lines."""
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if len(lines) > 1:
        whole, error = _parse(text)
        if error is None:
            yield lines[0][0], whole, None
            return
    for number, line in lines:
        yield number, *_parse(line)


def read_csv(path: Path, delimiter: str = ",") -> Iterator[RawRow]:
    """Rows of a table whose first line names the columns."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with _open(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        reader = csv.DictReader(text, delimiter=delimiter, strict=True)
        line = 1
        try:
            columns = len(reader.fieldnames or [])
            line = reader.line_num + 1
            for row in reader:
                yield line, *_check_csv_row(row, columns)
                line = reader.line_num + 1
        except UnicodeDecodeError as error:
            yield line, None, f"not UTF-8 text: {error.reason}; the rest of the file is not read"
        except (csv.Error, EOFError, OSError) as error:
            yield line, None, f"not a valid table: {error}; the rest of the file is not read"


def _check_csv_row(row: dict[Any, Any], columns: int) -> tuple[Any, str | None]:
    if None in row:
        return None, f"{columns + len(row[None])} fields, the header names {columns}"
    empty = sum(value is None for value in row.values())
    if empty:
        return None, f"{columns - empty} fields, the header names {columns}"
    return row, None


def read_tsv(path: Path) -> Iterator[RawRow]:
    """As read_csv, with tabs."""
    yield from read_csv(path, delimiter="\t")


def read_parquet(path: Path) -> Iterator[RawRow]:
    """Rows of a parquet file, a thousand at a time; the line is the row's number."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row, None
    except (pyarrow.ArrowException, OSError) as error:
        yield number + 1, None, f"not a readable parquet file: {error}"


def read_txt(path: Path) -> Iterator[RawRow]:
    """One text a line, as {"text": line}; blank lines are no rows."""
    for number, line, error in _lines(path):
        if error is not None:
            yield number, None, error
        elif line.strip():
            yield number, {"text": line}, None


READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".txt": read_txt,
}
SUFFIXES = ", ".join(READERS) + ", and each with .gz behind it"
