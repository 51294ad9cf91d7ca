"""A folder gets its name only when it is whole and verified, and says where it came from."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from xtuner_lite.processes import is_running
from xtuner_lite.version import __version__

RECEIPT = "export_receipt.json"
_PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors", "bitsandbytes", "gguf")
_MODEL_MARKS = (RECEIPT, "config.json", "adapter_config.json")
_HASHED = (".safetensors", ".bin", ".pth", ".json", ".model", ".jinja", ".txt")


class ExportError(RuntimeError):
    """An export that was refused or failed; nothing was published."""

    exit_code = 2


@dataclass
class Receipt:
    """What was exported, from what, and what the check of it found.

    Args:
        what: 'merge', 'split', 'copy', 'quantise' or 'gguf'.
        inputs: role -> description, of describe_folder.
        options: those that shape the result.
        verification: what Comparison.to_dict gives; empty only where it was switched off.
        notes: sentences for a person.
    """

    what: str
    inputs: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    verification: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Writes ``export_receipt.json``, with the size and sha256 of every other file there."""
        receipt = {
            "format": 1,
            "what": self.what,
            "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "inputs": self.inputs,
            "options": self.options,
            "verification": self.verification,
            "notes": self.notes,
            "versions": _versions(),
            "outputs": describe_files(folder, all_files=True),
        }
        text = json.dumps(receipt, indent=2, ensure_ascii=False) + "\n"
        (folder / RECEIPT).write_text(text, encoding="utf-8")


def describe_folder(name: str | Path, folder: Path) -> dict[str, Any]:
    """What a receipt says of an input: its name and the size and sha256 of its files.

    A local path is told by its last part only: a receipt is published, a home folder is not.
    """
    is_local = Path(name).expanduser().exists()
    return {"name": folder.name if is_local else str(name), "files": describe_files(folder)}


def describe_files(folder: Path, *, all_files: bool = False) -> dict[str, dict[str, Any]]:
    """File name -> size (bytes) and sha256, of the weights, settings and tokenizer of a folder."""
    paths = [folder] if folder.is_file() else sorted(folder.iterdir())
    return {
        path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in paths
        if path.is_file() and path.name != RECEIPT and (all_files or path.suffix in _HASHED)
    }


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def publishing(
    out: str | Path, *, overwrite: bool = False, sources: tuple[Path, ...] = (), num_bytes: int = 0
) -> Iterator[Path]:
    """An empty folder to fill; it gets the name ``out`` when the block ends without an error.

    With an error inside, nothing is left and what was under ``out`` before is untouched.

    Args:
        out: the folder to publish.
        overwrite: replace a model folder that is there.
        sources: folders that are read; ``out`` may not be one of them, nor lie inside one.
        num_bytes: what is about to be written, to refuse a full disk at once; 0 where unknown.

    Raises:
        ExportError: ``out`` is taken, or the disk is full.
    """
    out = Path(out).expanduser().absolute()
    check_target(out, overwrite=overwrite, sources=sources)
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if num_bytes > free:
        raise ExportError(
            f"{out} would take {_gib(num_bytes)}, and its disk has {_gib(free)} free; nothing was "
            "written. Free some space, or name a folder on another disk"
        )
    _clear_leftovers(out)
    aside = out.parent / f".writing-{out.name}-{os.getpid()}"
    aside.mkdir()
    try:
        yield aside
        _flush(aside)
        _rename(aside, out)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if _is_full(error):
            raise ExportError(
                f"{out} could not be written: no space left on the disk "
                f"({_gib(shutil.disk_usage(out.parent).free)} free). Nothing was left behind; free "
                "some space, or name a folder on another disk"
            ) from error
        raise


def check_target(out: Path, *, overwrite: bool, sources: tuple[Path, ...] = ()) -> None:
    """Raises ExportError unless ``out`` may be written."""
    for source in sources:
        source = source.resolve()
        if out.resolve() == source or source in out.resolve().parents:
            raise ExportError(
                f"{out} is read by this export, or lies inside {source}; name another"
            )
        if out.resolve() in source.parents:
            raise ExportError(f"{out} holds {source}, which this export reads; name another folder")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise ExportError(f"{out} is a file; name a folder that does not exist yet")
    if not overwrite:
        raise ExportError(f"{out} is not empty; name another folder, or replace it: --overwrite")
    if not any((out / name).is_file() for name in _MODEL_MARKS):
        raise ExportError(
            f"{out} is not empty and holds no model, so --overwrite does not delete it; empty it "
            "yourself, or name another folder"
        )


def _rename(aside: Path, out: Path) -> None:
    old = None
    if out.exists():
        old = out.parent / f".replaced-{out.name}-{os.getpid()}"
        out.rename(old)
    try:
        aside.rename(out)
    except OSError:
        if old is not None:
            old.rename(out)
        raise
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _clear_leftovers(out: Path) -> None:
    """Removes what a killed process left half-written beside ``out``."""
    for path in out.parent.glob(f".writing-{out.name}-*"):
        number = path.name.rpartition("-")[2]
        if number.isdigit() and not is_running(int(number)):
            shutil.rmtree(path, ignore_errors=True)


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _versions() -> dict[str, str]:
    found = {"xtuner_lite": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _is_full(error: BaseException) -> bool:
    codes = (errno.ENOSPC, errno.EDQUOT)
    return (isinstance(error, OSError) and error.errno in codes) or "No space left" in str(error)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
