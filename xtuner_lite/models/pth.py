"""Tensors out of a pickled checkpoint (.pth, .pt, .bin) of MMEngine or XTuner, and nothing else.

A pickle can run any code when it is opened. torch's restricted unpickler knows tensors only; every
other class or function that the file names is replaced by an empty shell before it is opened, so
that nothing of it is imported or called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SUFFIXES = (".pth", ".pt", ".bin")


class _Shell:
    """Stands for whatever a pickle names besides tensors; takes anything, does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Shell:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def read_pth(path: str | Path) -> dict[str, Tensor]:
    """name -> tensor (on the CPU) of a pickled checkpoint; its weights stand under 'state_dict'.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no checkpoint of torch, or holds no tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        shells = [(type("Shell", (_Shell,), {}), name) for name in named]
        with torch.serialization.safe_globals(shells):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint of torch: {error}") from error
    for key in ("state_dict", "module", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    tensors = content if isinstance(content, dict) else {}
    tensors = {k: v for k, v in tensors.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        raise ValueError(
            f"{path} holds no tensors by name (looked under 'state_dict' and 'module')"
        )
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


@torch.no_grad()
def load_pth(model: nn.Module, path: str | Path) -> int:
    """Copy the tensors of a pickled checkpoint into ``model`` by name; returns how many.

    All that trains must be there; frozen weights may be missing, as XTuner does not store them.

    Raises:
        ValueError: names or shapes do not fit.
    """
    tensors, own = read_pth(path), model.state_dict()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    problems = [f"missing: {name}" for name in sorted(trained - set(tensors))]
    problems += [f"unexpected: {name}" for name in sorted(set(tensors) - set(own))]
    problems += [
        f"{name} is {list(tensors[name].shape)} there and {list(own[name].shape)} here"
        for name in sorted(set(tensors) & set(own))
        if tensors[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(
            f"the weights in {path} do not fit {type(model).__name__}: {'; '.join(problems[:4])}"
            f"{more}. Use the model, r and target_modules they were trained with."
        )
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
    return len(tensors)
