"""The windows of a stream: rows by position, and the list of where each window begins."""

from __future__ import annotations

import bisect
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from xtuner_lite.data.cache import DataCacheError, SourceChanged
from xtuner_lite.data.sources import Row, Source

#: Bytes read of each end of a file to tell it from another.
_EDGE = 1 << 20


class Position(NamedTuple):
    """A place between rows."""

    read: int
    """How often all rows were read before."""
    source: int
    row: int
    """Rows of that source before it."""


@dataclass(frozen=True)
class Window:
    """Where a window begins and ends, and what it holds."""

    first_sample: int
    num_samples: int
    begin: Position
    end: Position
    digest: str
    """Of its tokens and packs."""

    @property
    def end_sample(self) -> int:
        """The first sample behind it."""
        return self.first_sample + self.num_samples


class StreamRows:
    """The rows of several sources by position, each source read forwards."""

    def __init__(self, sources: list[Source]) -> None:
        self.sources = sources
        self.identities = [[source.name, _identity(source)] for source in sources]
        self._reader: Iterator[Row] = iter(())
        # (process, source, row) that the reader gives next: a forked process shares the open file.
        self._next: tuple[int, int, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_next": None, "_reader": None}

    def take(self, begin: Position, count: int) -> tuple[list[Row], Position]:
        """Up to ``count`` rows from ``begin`` on, and where they end; none behind the last row."""
        read, source, row = begin
        rows: list[Row] = []
        while len(rows) < count and source < len(self.sources):
            if self._next != (os.getpid(), source, row):
                self._reader = self.sources[source].rows(row)
            more = list(islice(self._reader, count - len(rows)))
            rows += more
            row += len(more)
            self._next = (os.getpid(), source, row)
            if len(rows) < count:
                source, row = source + 1, 0
        return rows, Position(read, source, row)

    def check_unchanged(self) -> None:
        """Raises SourceChanged if a file has another size or another beginning or end."""
        for (name, before), source in zip(self.identities, self.sources):
            if source.path is not None and _identity(source) != before:
                raise SourceChanged(
                    f"{name} changed while it was streamed. Put the old file back and resume, or "
                    "start a new run."
                )


def _identity(source: Source) -> Any:
    """Size and both ends of a file: hashing all of it would mean reading all of it."""
    if source.path is None:
        return source.name
    size = source.path.stat().st_size
    digest = hashlib.sha256()
    with source.path.open("rb") as file:
        digest.update(file.read(_EDGE))
        file.seek(max(0, size - _EDGE))
        digest.update(file.read(_EDGE))
    return [size, digest.hexdigest()]


class WindowLog:
    """The windows seen so far, in memory and in a file that all processes of a run share."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._windows: list[Window] = []
        self._starts: list[int] = []
        self._refresh()

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, number: int) -> Window:
        return self._windows[number]

    def get(self, number: int) -> Window | None:
        """The window, if it is known."""
        return self._windows[number] if number < len(self._windows) else None

    def find(self, sample: int) -> int | None:
        """Number of the window that holds a sample; None if no known one does."""
        number = bisect.bisect_right(self._starts, sample) - 1
        while number >= 0:
            window = self._windows[number]
            if window.num_samples:
                return number if sample < window.end_sample else None
            number -= 1  # a window without samples begins where the next one does
        return None

    def append(self, number: int, window: Window) -> None:
        """Adds the window behind the last one; one that is there already is left."""
        if number < len(self._windows):
            return
        if self._file is not None:
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                with FileLock(f"{self._file}.lock"):
                    self._refresh(repair=True)
                    if number == len(self._windows):
                        with self._file.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(asdict(window)) + "\n")
                            file.flush()
                            os.fsync(file.fileno())
            except OSError as error:
                raise DataCacheError(
                    f"{self._file} cannot be written: {error.strerror or error}. Free space, or "
                    "set cache=False or another folder."
                ) from error
        if number == len(self._windows):
            self._add(window)
        elif self._windows[number] != window:
            raise SourceChanged(f"window {number} is not what another process read: data changed")

    def _refresh(self, repair: bool = False) -> None:
        """Takes over what other processes, or an earlier run, have written.

        Args:
            repair: cut off a line that a killed process left unfinished; only under the lock.
        """
        if self._file is None or not self._file.is_file():
            return
        with self._file.open("rb") as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):
                    if repair:
                        os.truncate(self._file, self._file.stat().st_size - len(line))
                    break
                if number >= len(self._windows):
                    saved = json.loads(line)
                    ends = {name: Position(*saved.pop(name)) for name in ("begin", "end")}
                    self._add(Window(**saved, **ends))

    def _add(self, window: Window) -> None:
        self._windows.append(window)
        self._starts.append(window.first_sample)
