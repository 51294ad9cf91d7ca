"""Files as bytes, decompressed on the way by the ending of their names."""

from __future__ import annotations

import bz2
import gzip
import importlib
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

#: What reading a damaged file raises, compressed or not.
READ_ERRORS: tuple[type[Exception], ...] = (EOFError, OSError, lzma.LZMAError, zlib.error)


def _open_zst(path: Path) -> Any:
    try:
        module = importlib.import_module("zstandard")
    except ImportError as error:
        raise ImportError(
            f"{path.name}: reading .zst files needs the zstandard package: pip install zstandard "
            "(or decompress the file)"
        ) from error
    return module.open(path, "rb")


#: Ending -> function that opens the file for reading bytes.
OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zst,
}


def split_suffix(path: Path) -> tuple[str, str]:
    """(file type, compression): ('.jsonl', '.gz') for 'a.jsonl.gz'; '' where there is none."""
    name = path.name.lower()
    packed = next((ending for ending in OPENERS if name.endswith(ending)), "")
    name = name.removesuffix(packed)
    return ("." + name.rsplit(".", 1)[1] if "." in name else ""), packed


def open_bytes(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed.

    Raises:
        ImportError: a .zst file without the package that reads it.
    """
    packed = split_suffix(path)[1]
    return OPENERS[packed](path) if packed else path.open("rb")


def read_errors() -> tuple[type[Exception], ...]:
    """READ_ERRORS and zstandard's own, where it is installed."""
    try:
        return (*READ_ERRORS, importlib.import_module("zstandard").ZstdError)
    except ImportError:
        return READ_ERRORS
