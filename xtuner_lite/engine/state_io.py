"""Nested training state to JSON + safetensors and back; no pickle on the way.

Dicts, lists, tuples, numbers, strings, None, bytes, NumPy arrays and tensors come back equal, with
their types. Anything else is refused by name, before a file is written.
"""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_MARK = "__kind__"


def save_state(state: Any, folder: Path, stem: str) -> None:
    """Write ``stem``.json and, where there are tensors, ``stem``.safetensors into ``folder``.

    Raises:
        TypeError: a value of another type; the message gives its path in the state.
    """
    tensors: dict[str, Tensor] = {}
    tree = _encode(state, stem, tensors)
    (folder / f"{stem}.json").write_text(json.dumps(tree, allow_nan=False), encoding="utf-8")
    if tensors:
        save_file(tensors, folder / f"{stem}.safetensors")


def load_state(folder: Path, stem: str) -> Any:
    """Read what ``save_state`` wrote; tensors lie on the CPU."""
    tree = json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))
    path = folder / f"{stem}.safetensors"
    return _decode(tree, load_file(path) if path.exists() else {})


def _encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        number = float(value)
        return number if math.isfinite(number) else {_MARK: "float", "value": repr(number)}
    if isinstance(value, Tensor):
        tensors[where] = value.detach().to("cpu", copy=True).contiguous()
        return {_MARK: "tensor", "key": where}
    if isinstance(value, np.ndarray):
        tensors[where] = torch.from_numpy(np.ascontiguousarray(value).copy())
        return {_MARK: "array", "key": where}
    if isinstance(value, bytes):
        return {_MARK: "bytes", "value": base64.b64encode(value).decode("ascii")}
    if isinstance(value, (list, tuple)):
        items = [_encode(item, f"{where}.{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {_MARK: "tuple", "items": items}
    if isinstance(value, dict):
        return _encode_dict(value, where, tensors)
    raise TypeError(
        f"the training state holds a {type(value).__name__} at {where!r}; a checkpoint stores "
        "numbers, strings, "
        "lists, dicts, arrays and tensors only. Give state_dict() plain values."
    )


def _encode_dict(value: dict, where: str, tensors: dict[str, Tensor]) -> Any:
    if all(isinstance(key, str) for key in value) and _MARK not in value:
        return {key: _encode(item, f"{where}.{key}", tensors) for key, item in value.items()}
    pairs = [
        [_encode(key, f"{where}.key{i}", tensors), _encode(item, f"{where}.{i}", tensors)]
        for i, (key, item) in enumerate(value.items())
    ]
    return {_MARK: "dict", "pairs": pairs}


def _decode(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_decode(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    kind = tree.get(_MARK)
    if kind is None:
        return {key: _decode(item, tensors) for key, item in tree.items()}
    if kind == "float":
        return float(tree["value"])
    if kind == "tensor":
        return tensors[tree["key"]]
    if kind == "array":
        return tensors[tree["key"]].numpy()
    if kind == "bytes":
        return base64.b64decode(tree["value"])
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in tree["items"])
    if kind == "dict":
        return {_decode(key, tensors): _decode(item, tensors) for key, item in tree["pairs"]}
    raise ValueError(
        f"unknown entry {kind!r} in a stored state; the checkpoint is of a newer version"
    )
