"""Encoded rows in a folder of flat files: written chunk by chunk, read as memory-mapped arrays."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from xtuner_lite.data.encode import EncodedRows
from xtuner_lite.data.image_rows import IMAGE_DTYPES
from xtuner_lite.data.ledger import Ledger

META = "meta.json"
_FORMAT = 1
_DTYPES = {
    "input_ids": np.int32, "learnt": np.bool_, "weights": np.float32, "lengths": np.int64,
    "source": np.int32, "line": np.int64, **IMAGE_DTYPES,
}  # fmt: skip
#: What training sees of the rows; the other arrays say where they are from.
_TAUGHT = ("input_ids", "learnt", "weights", "lengths")
#: Arrays that rows may lack, and that then are no files.
_OPTIONAL = ("weights", *IMAGE_DTYPES)


class DamagedStore(ValueError):
    """The folder is not what was written."""


@dataclass
class StoredRows(EncodedRows):
    """Rows whose arrays are memory-mapped files. Pickles as its folder."""

    folder: Path = Path()
    digest: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:
        return open_rows, (self.folder,)


def write_rows(
    folder: Path, chunks: Iterable[EncodedRows], meta: dict[str, Any], notes: Sequence[str] = ()
) -> None:
    """Writes the chunks and the sum of their ledgers into the existing, empty ``folder``.

    Args:
        meta: plain values stored beside them.
        notes: for the ledger.

    Raises:
        OSError: it cannot be written (the disk is full).
    """
    files = {name: _ArrayFile(folder, name) for name in _DTYPES}
    sources: dict[str, int] = {}
    ledger = Ledger(notes=list(notes))
    try:
        for chunk in chunks:
            ledger.add(chunk.ledger)
            _write_chunk(files, chunk, sources)
    finally:
        for file in files.values():
            file.close()
    absent = [name for name in _OPTIONAL if not files[name].size]
    digests = {name: file.digest.hexdigest() for name, file in files.items()}
    digests.update(dict.fromkeys(absent, ""))
    meta = {
        **meta,
        "format": _FORMAT,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "sources": list(sources),
        "bytes": {name: file.size for name, file in files.items() if name not in absent},
        "digest": _combined(digests),
        "ledger": ledger.to_dict(),
    }
    with (folder / META).open("w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)
        _to_disk(file)


def _write_chunk(files: dict[str, _ArrayFile], chunk: EncodedRows, sources: dict[str, int]) -> None:
    numbers = [sources.setdefault(name, len(sources)) for name in chunk.sources]
    places = np.array(numbers or [0], dtype=np.int32)[chunk.source]
    weights = files["weights"]
    if chunk.weights is not None and not weights.size:
        weights.write_all(1, files["input_ids"].size // 4)  # the chunks before had none
    if chunk.weights is not None:
        weights.write(chunk.weights)
    elif weights.size:
        weights.write_all(1, len(chunk.input_ids))
    counts = files["image_counts"]
    if chunk.image_counts is not None:
        if not counts.size:
            counts.write_all(0, files["lengths"].size // 8)
        counts.write(chunk.image_counts)
        files["image_ends"].write(chunk.image_ends + files["image_text"].size)
        files["image_text"].write(chunk.image_text)
    elif counts.size:
        counts.write_all(0, len(chunk.lengths))
    for name in ("input_ids", "learnt", "lengths", "line"):
        files[name].write(getattr(chunk, name))
    files["source"].write(places)


class _ArrayFile:
    """One array, appended to; its size in bytes and the sha256 of its bytes so far."""

    def __init__(self, folder: Path, name: str) -> None:
        self.dtype = _DTYPES[name]
        self.size = 0
        self.digest = hashlib.sha256()
        self._file: IO[bytes] = (folder / f"{name}.bin").open("wb")

    def write(self, array: np.ndarray) -> None:
        data = memoryview(np.ascontiguousarray(array, dtype=self.dtype)).cast("B")
        self._file.write(data)
        self.digest.update(data)
        self.size += len(data)

    def write_all(self, value: int, count: int) -> None:
        while count:
            part = min(count, 1 << 20)
            self.write(np.full(part, value, dtype=self.dtype))
            count -= part

    def close(self) -> None:
        _to_disk(self._file)
        self._file.close()


def _to_disk(file: IO[Any]) -> None:
    """A rename that outlives a power cut must not name a file whose bytes did not."""
    file.flush()
    os.fsync(file.fileno())


def open_rows(folder: Path) -> StoredRows:
    """The rows of a folder that ``write_rows`` filled.

    Raises:
        DamagedStore: files are missing or have another size.
    """
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        found = {name: (folder / f"{name}.bin").stat().st_size for name in meta["bytes"]}
    except (OSError, ValueError, KeyError) as error:
        raise DamagedStore(f"{folder}: {error}") from error
    if meta.get("format") != _FORMAT or found != meta["bytes"]:
        raise DamagedStore(f"{folder}: its files hold {found} bytes, not {meta['bytes']}")
    arrays = {name: _mapped(folder, name, size) for name, size in found.items()}
    for name in _OPTIONAL:
        arrays.setdefault(name, None)
    return StoredRows(
        **arrays,
        sources=meta["sources"],
        ledger=Ledger.from_dict(meta["ledger"]),
        folder=folder,
        digest=meta["digest"],
        meta=meta,
    )


def _mapped(folder: Path, name: str, size: int) -> np.ndarray:
    if size == 0:  # mmap refuses empty files
        return np.zeros(0, dtype=_DTYPES[name])
    return np.memmap(folder / f"{name}.bin", dtype=_DTYPES[name], mode="r")


def rows_digest(rows: EncodedRows) -> str:
    """Digest of every token, mask, weight and length: the same in memory and in a folder."""
    if isinstance(rows, StoredRows):
        return rows.digest
    digests = {}
    for name in (*_TAUGHT, *IMAGE_DTYPES):
        array = getattr(rows, name)
        data = b"" if array is None else np.ascontiguousarray(array, dtype=_DTYPES[name])
        digests[name] = "" if array is None else hashlib.sha256(data).hexdigest()
    return _combined(digests)


def _combined(digests: dict[str, str]) -> str:
    # Rows without images have the digest that they had before there were any.
    images = [digests[name] for name in IMAGE_DTYPES if digests[name]]
    text = json.dumps([digests[name] for name in _TAUGHT] + images)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
