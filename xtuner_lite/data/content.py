"""What a cached data set depends on, as digests: bytes of files, code of functions, a tokenizer."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import os
import sys
import sysconfig
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from transformers import PreTrainedTokenizerBase

from xtuner_lite.version import __version__

_BLOCK = 1 << 20
#: A file written less than this many nanoseconds before it was hashed may change again without a
#: new time stamp; what is remembered of it is not trusted.
_TICK_NS = 2_000_000_000


class NotKeyable(Exception):
    """Something whose content cannot be told, so that nothing made from it can be kept."""


# ------------------------------------------------------------------------------------------- files


def file_state(path: Path) -> list[int]:
    """[size, mtime_ns, ctime_ns, inode]: changes whenever the file is written or replaced.

    ctime cannot be set back, so a copy that keeps its time stamp (rsync, cp -p) is seen too.
    """
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def file_digest(path: Path, memory: Path | None = None) -> str:
    """sha256 of a file's bytes, in hexadecimal.

    Args:
        memory: folder where digests are remembered with the file's state, so that an unchanged
            file is not read again; None reads it.
    """
    path = path.resolve()
    note = memory / (_text_digest(str(path))[:32] + ".json") if memory else None
    state = file_state(path)
    if note is not None and (known := _remembered(note, state)) is not None:
        return known
    before = time.time_ns()
    digest = hashlib.sha256()
    buffer = bytearray(_BLOCK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    if note is not None and file_state(path) == state:
        _remember(note, {"path": str(path), "state": state, "read_ns": before,
                         "sha256": digest.hexdigest()})  # fmt: skip
    return digest.hexdigest()


def _remembered(note: Path, state: list[int]) -> str | None:
    try:
        saved = json.loads(note.read_text(encoding="utf-8"))
        written = max(saved["state"][1:3])
        if saved["state"] == state and written + _TICK_NS < saved["read_ns"]:
            return str(saved["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, or not what we write: the file is read
    return None


def _remember(note: Path, saved: dict[str, Any]) -> None:
    aside = note.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):  # only saves time; a full disk is told where rows are kept
        note.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(saved), encoding="utf-8")
        aside.replace(note)


# --------------------------------------------------------------------------------------- functions


def function_digest(function: Any) -> str:
    """What a map function is: its name, its arguments, the source text of its module and of those
    modules of the user that it reaches.

    Raises:
        NotKeyable: a lambda, a function without a source file, one that holds other objects.
    """
    return _text_digest(json.dumps(_function_parts(function), sort_keys=True))


def _function_parts(function: Any) -> Any:
    if isinstance(function, functools.partial):
        called_with = [list(function.args), function.keywords]
        return [_function_parts(function.func), _plain(called_with, "its arguments")]
    if isinstance(function, type):
        return [f"{function.__module__}:{function.__qualname__}", _module_texts(function)]
    if not isinstance(function, FunctionType):
        raise NotKeyable(f"{function!r:.60} is no plain function")
    if function.__name__ == "<lambda>":
        raise NotKeyable("a lambda")
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    defaults = [function.__defaults__, function.__kwdefaults__]
    return [
        f"{function.__module__}:{function.__qualname__}",
        _plain(held, "variables around it"),
        _plain(defaults, "its default arguments"),
        _module_texts(function),
    ]


def _plain(value: Any, what: str) -> Any:
    try:
        return json.loads(json.dumps(value, sort_keys=True))
    except (TypeError, ValueError) as error:
        raise NotKeyable(f"{what} are no plain data ({error})") from error


def _module_texts(function: Any) -> dict[str, str]:
    """file -> digest of its text, for the function's module and the user's modules behind it."""
    if _is_ours(function.__module__):
        return {}  # part of package_digest()
    try:
        first = inspect.getsourcefile(function)
    except TypeError:
        first = None
    if first is None or not Path(first).is_file():
        raise NotKeyable(f"{function.__qualname__} has no source file")
    names = getattr(function, "__globals__", None) or vars(sys.modules[function.__module__])
    texts = {first: file_digest(Path(first))}
    waiting = list(names.values())
    while waiting:
        value = waiting.pop()
        module = value if isinstance(value, ModuleType) else _module_of(value)
        file = getattr(module, "__file__", None)
        if file is None or file in texts or not _is_users(module.__name__, file):
            continue
        texts[file] = file_digest(Path(file))
        waiting += vars(module).values()
    return texts


def _module_of(value: Any) -> ModuleType | None:
    name = getattr(value, "__module__", None)
    return sys.modules.get(name) if isinstance(name, str) else None


def _is_ours(module: str | None) -> bool:
    return (module or "").split(".")[0] == "xtuner_lite"


def _is_users(module: str, file: str) -> bool:
    return file.endswith(".py") and not _is_ours(module) and not file.startswith(_installed())


@functools.cache
def _installed() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    return tuple({paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")})


# ------------------------------------------------------------------------- tokenizer and libraries


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Everything of a tokenizer that decides which ids a text gets; not its chat template."""
    parts: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "added": [[i, str(t), repr(t)] for i, t in sorted(tokenizer.added_tokens_decoder.items())],
    }
    if tokenizer.is_fast:
        state = tokenizer.backend_tokenizer.to_str()
        if tokenizer.backend_tokenizer.truncation or tokenizer.backend_tokenizer.padding:
            parsed = json.loads(state)  # left over from some call; encoding turns them off
            parsed["truncation"] = parsed["padding"] = None
            state = json.dumps(parsed, sort_keys=True)
        parts["backend"] = _text_digest(state)
    else:
        parts["vocab"] = sorted(tokenizer.get_vocab().items())
        parts["options"] = repr(sorted(tokenizer.init_kwargs.items(), key=str))
        for name in tokenizer.vocab_files_names:
            file = getattr(tokenizer, name, None)
            if isinstance(file, str) and Path(file).is_file():
                parts[name] = file_digest(Path(file))
    return _text_digest(json.dumps(parts, sort_keys=True))


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the chat template(s) the tokenizer carries."""
    return _text_digest(json.dumps(tokenizer.chat_template, sort_keys=True))


def library_versions() -> dict[str, str]:
    """Versions of what turns a row into tokens; ours with a digest of its code."""
    versions = {"xtuner_lite": f"{__version__}+{package_digest()[:12]}"}
    for name in ("transformers", "tokenizers", "jinja2", "pyarrow"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "none"
    return versions


@functools.cache
def package_digest() -> str:
    """Digest of our own code that rows pass through: data, templates and images."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for folder in ("data", "images", "templates"):
        for file in sorted((root / folder).rglob("*")):
            if file.suffix in (".py", ".jinja"):
                digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
