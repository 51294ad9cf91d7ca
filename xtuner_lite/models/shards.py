"""Weights on disk, one tensor at a time: read lazily, written in shards with an index."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
#: Index of the shards, and the only file, of each form; safetensors is looked for first.
_FORMS = ((INDEX_FILE, SINGLE_FILE), ("pytorch_model.bin.index.json", "pytorch_model.bin"))


class WeightFiles:
    """The tensors of a model folder by name; nothing is read before it is asked for.

    Reads safetensors, and pickled ``.bin`` shards through ``torch.load(weights_only=True)``, which
    takes tensors and runs no code. A context manager: the files are closed at its end.

    Args:
        folder: a model folder.

    Raises:
        FileNotFoundError: it holds no weights, or a shard that its index names is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._opened: dict[str, Any] = {}
        self._home: dict[str, str] = {}  # tensor name -> file name
        for index, single in _FORMS:
            if (folder / index).is_file():
                text = (folder / index).read_text(encoding="utf-8")
                self._home = dict(json.loads(text)["weight_map"])
                missing = sorted({n for n in self._home.values() if not (folder / n).is_file()})
                if missing:
                    raise FileNotFoundError(
                        f"{folder / index} names {', '.join(missing[:3])}, which is not there; "
                        "fetch the folder again"
                    )
                return
            if (folder / single).is_file():
                self._home = dict.fromkeys(self._open(single)[0], single)
                return
        known = ", ".join(name for form in _FORMS for name in form)
        raise FileNotFoundError(f"{folder} holds no weights: none of {known}; fetch it again")

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._opened.clear()
        self._stack.close()

    @property
    def names(self) -> list[str]:
        """Names of all tensors, those of one file together."""
        return sorted(self._home, key=lambda name: (self._home[name], name))

    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU in its own dtype.

        Raises:
            KeyError: no tensor of that name.
        """
        return self._open(self._home[name])[1](name)

    def _open(self, file: str) -> tuple[list[str], Any]:
        """(tensor names, function from a name to its tensor) of one file; one is open at a time."""
        if file not in self._opened:
            self._opened.clear()
            self._stack.close()
            path = self.folder / file
            if file.endswith(".safetensors"):
                stream = self._stack.enter_context(safe_open(str(path), framework="pt"))
                self._opened[file] = list(stream.keys()), stream.get_tensor
            else:
                tensors = _read_pickled(path)
                self._opened[file] = list(tensors), tensors.__getitem__
        return self._opened[file]


def _read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.bin`` file, mapped into memory where its format allows it."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        found = torch.load(path, map_location="cpu", weights_only=True)  # torch's old format
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ValueError(f"{path} is no file of named tensors; give a model's weights")
    return found


def write_shards(
    tensors: Iterator[tuple[str, Tensor]], folder: Path, *, max_shard_size: int = 2 * 10**9
) -> None:
    """Writes named tensors as safetensors shards with an index; one file and no index if they fit.

    Memory: one shard.

    Args:
        tensors: (name, tensor) pairs, made one at a time.
        folder: an existing folder.
        max_shard_size: bytes of a shard; one tensor may be larger.
    """
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal pending, size
        save_file(pending, str(folder / f"part-{len(shards):05d}"), metadata={"format": "pt"})
        shards.append(list(pending))
        pending, size = {}, 0

    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if pending and size + num_bytes > max_shard_size:
            flush()
        pending[name] = tensor.contiguous()
        size, total = size + num_bytes, total + num_bytes
    flush()
    weight_map = {}
    for index, names in enumerate(shards):
        single = len(shards) == 1
        file = SINGLE_FILE if single else f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{index:05d}").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
