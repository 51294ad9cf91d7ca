"""Prepared data sets kept on disk: found by their content, written aside, safe for many processes.

An entry is a folder of memory-mapped arrays (data/store.py) named after the digest of everything
that decides what is in it. Nothing is ever changed in place: a new content is a new entry.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from mmengine.logging import print_log

from xtuner_lite.data.content import (
    NotKeyable,
    file_digest,
    file_state,
    function_digest,
    library_versions,
    template_digest,
    tokenizer_digest,
)
from xtuner_lite.data.encode import EncodedRows
from xtuner_lite.data.packing import Packs
from xtuner_lite.data.row_images import BadImage
from xtuner_lite.data.sources import Source
from xtuner_lite.data.store import META, DamagedStore, StoredRows, open_rows, write_rows
from xtuner_lite.home import data_cache_dir

CacheOption = Literal["auto", False] | str
_ASIDE = ".building-"
_LATER = "free space, or set cache=False (tokens are kept in memory) or cache='/another/folder'"


class DataCacheError(RuntimeError):
    """The cache cannot be written."""


@dataclass(frozen=True)
class CacheKey:
    """Everything that decides what a data set becomes, by the name a person knows it by."""

    parts: dict[str, Any]

    @property
    def digest(self) -> str:
        """32 hexadecimal digits."""
        text = json.dumps(self.parts, sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def cache_root(cache: CacheOption) -> Path:
    """The folder that the option ``cache`` names.

    Raises:
        ValueError: True, or something else that is neither "auto" nor a path.
    """
    if cache == "auto":
        return data_cache_dir()
    if isinstance(cache, (str, Path)) and str(cache):
        return Path(cache).expanduser()
    raise ValueError(f"cache={cache!r} is unknown; allowed: 'auto', False, or a folder to keep it")


def make_key(
    sources: Iterable[Source],
    *,
    map_fn: Any,
    tokenizer: Any,
    options: dict[str, Any],
    memory: Path | None,
) -> CacheKey:
    """The key of a data set.

    Args:
        map_fn: the function, or "auto".
        options: name -> plain value of every option that changes tokens or mask.
        memory: folder that remembers digests of unchanged files.

    Raises:
        NotKeyable: rows in memory, a lambda, or something else whose content cannot be told.
    """
    contents = {}
    for number, source in enumerate(sources):
        content = source.content() if source.path is None else file_digest(source.path, memory)
        if content is None:
            raise NotKeyable(f"{source.name}: rows in memory, or streamed")
        contents[f"{number} {source.name}"] = content
    try:
        function = map_fn if isinstance(map_fn, str) else function_digest(map_fn)
    except NotKeyable as error:
        raise NotKeyable(f"map_fn: {error}") from error
    return CacheKey(
        {
            "source files": contents,
            "map_fn (its code or its arguments)": function,
            "tokenizer": tokenizer_digest(tokenizer),
            "chat template": template_digest(tokenizer),
            **options,
            **library_versions(),
        }
    )


class DataCache:
    """The entries below one folder.

    Args:
        root: made when something is written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def memory(self) -> Path:
        """Where digests of files are remembered."""
        return self.root / "files"

    def rows(
        self,
        key: CacheKey,
        name: str,
        build: Callable[[], tuple[Iterable[EncodedRows], list[str]]],
    ) -> StoredRows:
        """The rows of ``key``: those kept, or those that ``build`` makes.

        Of several processes that want the same rows one builds and the others wait for it. Where
        rows come from, and why they were not there, is said on a line.

        Args:
            name: of the data set, for messages.
            build: gives the encoded chunks and notes for the ledger. Called under the lock.

        Raises:
            DataCacheError: the folder cannot be written; nothing half-written is left there.
        """
        entry = self.root / f"{_slug(name)}-{key.digest}"
        if (kept := self._kept(entry, name)) is not None:
            return kept
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = self._lock(entry, name)
        except OSError as error:
            raise self._cannot_write(error) from error
        with lock:
            if (kept := self._kept(entry, name)) is not None:
                return kept
            self._sweep(entry)
            _say(f"data cache: {name} {self._why(key, name)}; kept in {entry}")
            return self._build(entry, key, name, build)

    def _kept(self, entry: Path, name: str) -> StoredRows | None:
        if not entry.is_dir():
            return None
        try:
            rows = open_rows(entry)
        except DamagedStore as error:
            _say(f"data cache: {error}; the entry is not used", logging.WARNING)
            return None
        _say(f"data cache: {name} is taken from {entry} (made {rows.meta['time']})")
        if bad := rows.ledger.skipped.get(BadImage.reason):
            # The key knows the rows and not the images, which may be there by now.
            _say(
                f"data cache: {name} lacks {bad.count:,} row(s) whose images could not be read "
                f"when it was made; if they can be now, delete {entry}",
                logging.WARNING,
            )
        return rows

    def _lock(self, entry: Path, name: str) -> FileLock:
        """The entry's lock, taken."""
        lock = FileLock(f"{entry}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _say(f"data cache: another process prepares {name}; waiting for it")
            lock.acquire()
        return lock

    def _build(
        self,
        entry: Path,
        key: CacheKey,
        name: str,
        build: Callable[[], tuple[Iterable[EncodedRows], list[str]]],
    ) -> StoredRows:
        try:
            aside = Path(tempfile.mkdtemp(prefix=f"{_ASIDE}{entry.name}-", dir=self.root))
        except OSError as error:
            raise self._cannot_write(error) from error
        try:
            chunks, notes = build()
            reading = _Guarded(chunks)
            try:
                write_rows(aside, reading, {"name": name, "key": key.parts}, notes)
            except OSError as error:
                if reading.failed:  # the source, not the cache
                    raise
                raise self._cannot_write(error) from error
            if entry.exists():  # damaged, or it would have been used
                shutil.rmtree(entry)
            aside.rename(entry)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return open_rows(entry)

    def _cannot_write(self, error: OSError) -> DataCacheError:
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(self.root).free / 2**20
            return DataCacheError(
                f"the data cache in {self.root} cannot be written: {error.strerror or error} "
                f"({free:,.0f} MiB free). Nothing half-written is left. To go on, {_LATER}."
            )
        return DataCacheError(
            f"the data cache in {self.root} cannot be written: {error.strerror or error}. To go "
            f"on, {_LATER}."
        )

    def _sweep(self, entry: Path) -> None:
        """Removes what a killed process left: half-built folders whose lock nobody else holds."""
        for left in self.root.glob(f"{_ASIDE}*"):
            owner = self.root / left.name.removeprefix(_ASIDE).rpartition("-")[0]
            if owner == entry:  # its lock is ours
                shutil.rmtree(left, ignore_errors=True)
                continue
            with contextlib.suppress(Timeout, OSError):
                with FileLock(f"{owner}.lock").acquire(timeout=0):
                    shutil.rmtree(left, ignore_errors=True)

    def _why(self, key: CacheKey, name: str) -> str:
        """What differs from the most similar entry of the same data set."""
        nearest: tuple[tuple[int, str], dict[str, Any], str] | None = None
        for file in self.root.glob(f"*/{META}"):
            try:
                meta = json.loads(file.read_text(encoding="utf-8"))
                if meta["name"] != name:
                    continue
                same = sum(meta["key"].get(part) == value for part, value in key.parts.items())
                found = ((same, meta["time"]), meta["key"], meta["time"])
            except (OSError, ValueError, KeyError, TypeError):
                continue  # being removed, or of another version
            if nearest is None or found[0] > nearest[0]:
                nearest = found
        if nearest is None:
            return "is prepared for the first time"
        changes = ", ".join(_changes(nearest[1], key.parts)) or "the entry is damaged"
        return f"is prepared anew, what changed since {nearest[2]}: {changes}"


class _Guarded:
    """An iterable that remembers whether it was the one that raised."""

    def __init__(self, items: Iterable[EncodedRows]) -> None:
        self._items = items
        self.failed = False

    def __iter__(self) -> Iterator[EncodedRows]:
        try:
            yield from self._items
        except GeneratorExit:
            raise
        except BaseException:
            self.failed = True
            raise


def _changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    for part in [*new, *(part for part in old if part not in new)]:
        before, after = old.get(part), new.get(part)
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
            shown = ", ".join(name.partition(" ")[2] for name in names[:3])
            yield f"{part} ({shown}{', ...' if len(names) > 3 else ''})"
        elif any(isinstance(value, str) and len(value) == 64 for value in (before, after)):
            yield part  # digests say nothing to a person
        else:
            yield f"{part} {before!r} -> {after!r}"


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)[-40:].strip("._-") or "data"


def _say(text: str, level: int = logging.INFO) -> None:
    print_log(text, logger="current", level=level)


class SourceChanged(ValueError):
    """A file was written while it was read."""


def unchanged(sources: Iterable[Source]) -> Callable[[], None]:
    """Notes the state of the sources' files; what it returns raises if one has changed since.

    Raises:
        SourceChanged: by the returned function.
    """
    before = {source.path: file_state(source.path) for source in sources if source.path}

    def check() -> None:
        for path, state in before.items():
            try:
                same = file_state(path) == state
            except FileNotFoundError:
                same = False
            if not same:
                raise SourceChanged(
                    f"{path} changed while it was read, so its rows may be of two versions. Start "
                    "again when nothing writes to it."
                )

    return check


def kept_packs(rows: EncodedRows, name: str, make: Callable[[], Packs]) -> Packs:
    """The packs stored beside cached rows under ``name``, made and stored first if need be."""
    if not isinstance(rows, StoredRows):
        return make()
    file = rows.folder / f"packs-{name}.npz"
    if file.is_file():
        with np.load(file, allow_pickle=False) as arrays:
            return Packs(**{part: arrays[part] for part in ("row", "start", "end", "sample")})
    packs = make()
    arrays = {part: getattr(packs, part) for part in ("row", "start", "end", "sample")}
    with contextlib.suppress(OSError):  # a second's work: it is done again next time
        with tempfile.TemporaryDirectory(prefix=".packs-", dir=rows.folder) as aside:
            np.savez(Path(aside) / file.name, **arrays)
            (Path(aside) / file.name).replace(file)
    return packs
