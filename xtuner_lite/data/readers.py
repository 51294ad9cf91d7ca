"""One reader per file type: yields (line, data, error) for every row, bad ones included.

Each takes ``skip``: so many rows, bad ones counted, are passed over as cheaply as the file type
allows. No reader holds more than a few rows.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from xtuner_lite.data.compressed import OPENERS, open_bytes, read_errors, split_suffix
from xtuner_lite.data.json_window import (
    JsonWindow,
    RawRow,
    array_rows,
    parse,
    value_rows,
)

_BOM = b"\xef\xbb\xbf"
_BATCH_ROWS = 1000


def suffix_of(path: Path) -> str:
    """The file type's ending, without a compression's behind it: '.jsonl' for 'a.jsonl.gz'."""
    return split_suffix(path)[0]


def _lines(path: Path, skip: int) -> Iterator[tuple[int, str, str | None]]:
    """(1-based number, text without its line end, error) of each line that is not blank."""
    number = 0
    with open_bytes(path) as file:
        try:
            for number, raw in enumerate(file, start=1):
                if number == 1:
                    raw = raw.removeprefix(_BOM)
                if raw.isspace() or not raw:
                    continue
                if skip:
                    skip -= 1
                    continue
                try:
                    yield number, raw.decode("utf-8").rstrip("\r\n"), None
                except UnicodeDecodeError as error:
                    byte = raw[error.start]
                    yield number, "", f"not UTF-8 text: byte 0x{byte:02x} at {error.start}"
        except read_errors() as error:
            yield number + 1, "", f"the file cannot be read further: {error}"


def read_jsonl(path: Path, skip: int = 0) -> Iterator[RawRow]:
    """One JSON value a line; blank lines are no rows."""
    for number, line, error in _lines(path, skip):
        yield (number, None, error) if error is not None else (number, *parse(line))


def read_json(path: Path, skip: int = 0) -> Iterator[RawRow]:
    """A JSON array of rows, each with the line it starts on; or one JSON value a line."""
    with open_bytes(path) as file:
        window = JsonWindow(file)
        if window.peek() == "[":
            window.skip()
            yield from islice(array_rows(window), skip, None)
            return
    if _first_line_is_a_row(path):
        yield from read_jsonl(path, skip)
        return
    with open_bytes(path) as file:
        yield from islice(value_rows(JsonWindow(file)), skip, None)


def _first_line_is_a_row(path: Path) -> bool:
    lines = (line for _, line, _ in _lines(path, 0))
    first = next(lines, "")
    return parse(first)[1] is None and next(lines, None) is not None


def read_csv(path: Path, skip: int = 0, delimiter: str = ",") -> Iterator[RawRow]:
    """Rows of a table whose first line names the columns."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with open_bytes(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        reader = csv.DictReader(text, delimiter=delimiter, strict=True)
        yield from islice(_csv_rows(reader), skip, None)


def _csv_rows(reader: csv.DictReader[str]) -> Iterator[RawRow]:
    line = 1
    try:
        columns = len(reader.fieldnames or [])
        line = reader.line_num + 1
        for row in reader:
            yield line, *_check_csv_row(row, columns)
            line = reader.line_num + 1
    except UnicodeDecodeError as error:
        yield line, None, f"not UTF-8 text: {error.reason}; the rest of the file is not read"
    except (csv.Error, *read_errors()) as error:
        yield line, None, f"not a valid table: {error}; the rest of the file is not read"


def _check_csv_row(row: dict[Any, Any], columns: int) -> tuple[Any, str | None]:
    if None in row:
        return None, f"{columns + len(row[None])} fields, the header names {columns}"
    empty = sum(value is None for value in row.values())
    if empty:
        return None, f"{columns - empty} fields, the header names {columns}"
    return row, None


def read_tsv(path: Path, skip: int = 0) -> Iterator[RawRow]:
    """As read_csv, with tabs."""
    yield from read_csv(path, skip, delimiter="\t")


def read_parquet(path: Path, skip: int = 0) -> Iterator[RawRow]:
    """Rows of a parquet file, a thousand at a time; the line is the row's number."""
    import pyarrow.parquet

    def batches() -> Iterator[Any]:
        with pyarrow.parquet.ParquetFile(path) as file:
            groups, number = range(file.num_row_groups), 0
            for group in groups:
                size = file.metadata.row_group(group).num_rows
                number += size
                if number <= skip:
                    yield size
                else:
                    yield from file.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group])

    yield from _arrow_rows(batches(), skip, "parquet")


def read_arrow(path: Path, skip: int = 0) -> Iterator[RawRow]:
    """Rows of an Arrow file or stream (what datasets' save_to_disk writes); numbered from 1."""
    import pyarrow

    def batches() -> Iterator[Any]:
        with pyarrow.memory_map(str(path)) as source:
            try:
                reader = pyarrow.ipc.open_stream(source)
            except pyarrow.ArrowInvalid:  # the file format, with its index at the end
                source.seek(0)
                with pyarrow.ipc.open_file(source) as file:
                    for index in range(file.num_record_batches):
                        yield from _small(file.get_batch(index))
                return
            with reader:
                for batch in reader:
                    yield from _small(batch)

    yield from _arrow_rows(batches(), skip, "Arrow")


def _small(batch: Any) -> Iterator[Any]:
    for start in range(0, batch.num_rows, _BATCH_ROWS):
        yield batch.slice(start, _BATCH_ROWS)


def _arrow_rows(batches: Iterator[Any], skip: int, kind: str) -> Iterator[RawRow]:
    """Rows of record batches; a number stands for as many rows that were skipped."""
    import pyarrow

    number = 0
    try:
        for batch in batches:
            size = batch if isinstance(batch, int) else batch.num_rows
            if number + size > skip:
                for offset, row in enumerate(batch.to_pylist(), start=number + 1):
                    if offset > skip:
                        yield offset, row, None
            number += size
    except (pyarrow.ArrowException, OSError) as error:
        yield number + 1, None, f"not a readable {kind} file: {error}"


def read_txt(path: Path, skip: int = 0) -> Iterator[RawRow]:
    """One text a line, as {"text": line}; blank lines are no rows."""
    for number, line, error in _lines(path, skip):
        yield (number, {"text": line}, None) if error is None else (number, None, error)


READERS: dict[str, Callable[..., Iterator[RawRow]]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".txt": read_txt,
}
#: File types that hold their own compression and are read at random places.
BINARY = (".parquet", ".arrow")
SUFFIXES = ", ".join(READERS) + f"; text files also with {', '.join(OPENERS)} behind it"
