"""Rows from files, the hub or memory; each knows its place, and a bad one says what is wrong."""

from __future__ import annotations

import difflib
import glob
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from xtuner_lite.data.compressed import split_suffix
from xtuner_lite.data.json_window import RawRow, show_position
from xtuner_lite.data.readers import BINARY, READERS, SUFFIXES, suffix_of

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_MODELSCOPE = "modelscope:"
_GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Row:
    """One row of a source: its data, or why it could not be read."""

    source: str
    """The file as the user named it; 'rows' for lists, the id for hub data sets."""
    line: int
    """1-based line of a text file, else the row's 1-based number; see show_position."""
    data: Any
    error: str | None = None

    @property
    def place(self) -> str:
        """'file:line', or 'file:1 (row 7)' where several rows of a JSON list share a line."""
        return f"{self.source}:{show_position(self.line)}"


@dataclass(frozen=True)
class Source:
    """One file, hub data set or list of rows."""

    name: str
    """As the user gave it."""
    read: Callable[[int], Iterable[RawRow]]
    """Its rows, without the first so many."""
    path: Path | None = None
    """The file whose bytes are its content."""
    content: Callable[[], str | None] = lambda: None
    """What tells its content where there is no file; None: nothing does."""

    def rows(self, skip: int = 0) -> Iterator[Row]:
        """Its rows in order. Raises ValueError if there are none at all."""
        count = skip
        for line, value, error in self.read(skip):
            count += 1
            yield Row(self.name, line, value, error)
        if count == 0:
            raise ValueError(
                f"{self.name} holds no rows: the file is empty. Remove it from data=, or fill it."
            )


def read_rows(data: Any) -> Iterator[Row]:
    """Yields the rows of a source, in order. Files are read lazily. Raises as open_sources."""
    for source in open_sources(data):
        yield from source.rows()


def open_sources(data: Any) -> list[Source]:
    """The single sources behind ``data``, none of them read yet.

    Args:
        data: a path, folder, glob or hub id ('modelscope:owner/name' for ModelScope's); a list of
            them; a list of dicts; a ``datasets`` object or folder saved by it; or a config
            ``dict(type=load_dataset, ...)`` that makes one.

    Raises:
        FileNotFoundError: no such file or folder; the nearest existing names are in the message.
        ValueError: an empty file or source, or a file type that is not known.
        ImportError: a package that reads this source is missing; its pip command is in the message.
    """
    if isinstance(data, Mapping) and "type" in data:
        return open_sources(_call(data))
    if isinstance(data, (str, Path)):
        return _open_name(str(data))
    if hasattr(data, "to_hf_dataset"):  # ModelScope's MsDataset
        data = data.to_hf_dataset()
    if _is_hub_dataset(data):
        name = str(getattr(getattr(data, "info", None), "dataset_name", None) or "dataset")
        return [_of_dataset(name, lambda: data)]
    if isinstance(data, (list, tuple)):
        return _open_list(list(data))
    raise TypeError(
        f"data is a {type(data).__name__}; allowed: a path, folder, glob or hub id, a list of "
        "them, a list of dicts, a datasets.Dataset, or dict(type=load_dataset, ...)"
    )


def _open_list(data: list[Any]) -> list[Source]:
    if not data:
        raise ValueError("data is an empty list; give it rows (dicts) or paths")
    if all(isinstance(item, (str, Path)) for item in data):
        return [source for item in data for source in _open_name(str(item))]
    if any(isinstance(item, (str, Path)) for item in data):
        raise TypeError("data mixes paths and rows in one list; give a list of one kind")
    return [Source("rows", lambda skip: _numbered(map(_plain, data[skip:]), skip))]


def _plain(row: Any) -> Any:
    """A row written in a config is a ConfigDict down to its messages; templates want dicts."""
    return row.to_dict() if isinstance(row, dict) and hasattr(row, "to_dict") else row


def _numbered(rows: Iterable[Any], skipped: int) -> Iterator[RawRow]:
    for number, row in enumerate(rows, start=skipped + 1):
        yield number, row, None


def _of_dataset(name: str, load: Callable[[], Any]) -> Source:
    """A data set of the datasets library, loaded once, when it is first needed."""
    loaded = cache(load)

    def read(skip: int) -> Iterator[RawRow]:
        dataset = loaded()
        return _numbered(dataset.skip(skip) if skip else dataset, skip)

    def content() -> str | None:
        """datasets' own fingerprint; a streamed data set has none."""
        dataset = loaded()
        own = getattr(dataset, "_fingerprint", None)
        return None if own is None else f"datasets fingerprint {own}, {len(dataset)} rows"

    return Source(name, read, content=content)


def _open_name(name: str) -> list[Source]:
    if name.startswith(_MODELSCOPE):
        return [_of_dataset(name, lambda: _load_from_modelscope(name.removeprefix(_MODELSCOPE)))]
    path = Path(name).expanduser()
    if path.is_file():
        return [_open_file(name, path)]
    if path.is_dir():
        return _open_folder(name, path)
    if _GLOB.search(name):
        found = sorted(glob.glob(str(path), recursive=True))
        files = [f for f in found if Path(f).is_file()]
        if not files:
            raise FileNotFoundError(f"no file matches {name!r}{_nearest(path)}. Correct data=.")
        return [_open_file(f, Path(f)) for f in files]
    looks_local = suffix_of(path) in READERS or path.parent.is_dir()
    if _HUB_ID.fullmatch(name) and not looks_local:
        return [_of_dataset(name, lambda: _load_from_hub(name))]
    raise FileNotFoundError(f"{name!r} does not exist{_nearest(path)}. Correct data=.")


def _open_folder(name: str, path: Path) -> list[Source]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _open_saved(name, path)
    files = sorted(p for p in path.iterdir() if p.is_file() and suffix_of(p) in READERS)
    if not files:
        held = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"folder {name!r} holds no data file (it holds {held}); allowed: {SUFFIXES}"
        )
    return [_open_file(str(file), file) for file in files]


def _open_saved(name: str, path: Path) -> list[Source]:
    """A folder that datasets' save_to_disk wrote: its Arrow files, in their order."""
    splits = path / "dataset_dict.json"
    if splits.is_file():
        names = json.loads(splits.read_text(encoding="utf-8")).get("splits", [])
        if "train" not in names:
            raise ValueError(
                f"{name!r} has the splits {sorted(names)}, none called 'train'; "
                f"name the folder of one, such as {str(path / (names or ['test'])[0])!r}"
            )
        path = path / "train"
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        files = [path / entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{name!r} was saved by datasets' save_to_disk, but is not whole: {error!r}. Save it "
            "again."
        ) from error
    return [_open_file(str(file), file) for file in files]


def _open_file(name: str, path: Path) -> Source:
    suffix, packed = split_suffix(path)
    if suffix not in READERS:
        raise ValueError(
            f"{name!r}: the file type {path.suffix or 'without an ending'!r} is not known; "
            f"allowed: {SUFFIXES}. Rename or convert the file."
        )
    if packed and suffix in BINARY:
        raise ValueError(f"{name!r}: {suffix} files are compressed inside; decompress this one")
    if not path.is_file():
        raise FileNotFoundError(f"{name!r} does not exist{_nearest(path)}. Correct data=.")
    if path.stat().st_size == 0:
        raise ValueError(f"{name} is empty (0 bytes). Remove it from data=, or fill it.")
    return Source(name, lambda skip: READERS[suffix](path, skip), path)


def _nearest(path: Path) -> str:
    """Existing names like the missing one, in the deepest folder of the path that exists."""
    folder, missing = path.parent, path.name
    while not folder.is_dir() and folder != folder.parent:
        folder, missing = folder.parent, folder.name
    try:
        names = sorted(p.name for p in folder.iterdir())
    except OSError:
        return ""
    near = difflib.get_close_matches(missing, names, n=2, cutoff=0.6)
    if near:
        return "; did you mean " + " or ".join(repr(str(folder / n)) for n in near) + "?"
    return f"; {str(folder)!r} holds {', '.join(names[:8]) or 'nothing'}"


def _is_hub_dataset(data: Any) -> bool:
    return hasattr(data, "column_names") and hasattr(data, "__iter__")


def _load_from_hub(name: str) -> Any:
    from datasets import load_dataset

    try:
        return _one_split(load_dataset(name), name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name!r} is no local file or folder{_nearest(Path(name))}, and as a hub data set it "
            f"cannot be loaded: {error}. Correct data=, or check the network."
        ) from error


def _load_from_modelscope(name: str) -> Any:
    try:
        from modelscope.msdatasets import MsDataset
    except ImportError as error:
        raise ImportError(
            f"'{_MODELSCOPE}{name}' needs the modelscope package: pip install modelscope"
        ) from error
    try:
        loaded = MsDataset.load(name)
        loaded = loaded if isinstance(loaded, Mapping) else {"train": loaded}
        found = _one_split(loaded, name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"ModelScope's data set {name!r} cannot be loaded: {error}. Correct data=, or check "
            "the network."
        ) from error
    return found.to_hf_dataset() if hasattr(found, "to_hf_dataset") else found


def _call(config: Mapping[str, Any]) -> Any:
    """Builds ``dict(type=load_dataset, ...)``: the type is a callable, lazy or not."""
    arguments = {key: value for key, value in config.items() if key != "type"}
    function = config["type"]
    if not callable(function) and hasattr(function, "build"):  # mmengine's LazyObject
        function = function.build()
    if isinstance(function, str):
        from xtuner_lite.registry import DATASETS

        function = DATASETS.get(function)
    if not callable(function):
        raise TypeError(
            f"data=dict(type={config['type']!r}): the type is not a function; "
            "import it in the config, as in dict(type=load_dataset, path='json', ...)"
        )
    return _one_split(function(**arguments), str(arguments.get("path", "dataset")))


def _one_split(dataset: Any, name: str) -> Any:
    """The data set itself, or the only split of a dict of splits."""
    if isinstance(dataset, Mapping):
        if "train" in dataset:
            return dataset["train"]
        raise ValueError(
            f"{name!r} has the splits {sorted(dataset)}, none called 'train'; choose one with "
            "dict(type=load_dataset, path=..., split=...)"
        )
    return dataset
