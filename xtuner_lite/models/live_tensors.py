"""How many bytes of tensors are alive while code runs, counted at every operator."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that operators make, while they live. Real or fake tensors.

    Args:
        known: tensors that are not counted (parameters, buffers, inputs).

    Attributes:
        now: bytes alive.
        peak: highest ``now`` since ``restart_peak``.
        copies: bytes alive that are another dtype's copy of a parameter.
    """

    def __init__(self, known: Iterable[Tensor], parameters: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = self.copies = 0
        self._parameters = {_storage(p)._cdata for p in parameters}
        self._known = {_storage(t)._cdata for t in known} | self._parameters
        self._alive: set[int] = set()

    def restart_peak(self) -> None:
        """Measure the peak from here on."""
        self.peak = self.now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        is_copy = (
            func is torch.ops.aten._to_copy.default and _storage(args[0])._cdata in self._parameters
        )
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor, is_copy)
        return out

    def _see(self, tensor: Tensor, is_copy: bool) -> None:
        storage = _storage(tensor)
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._alive:
            return
        self._alive.add(key)
        self.now += size
        self.copies += size * is_copy
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size, is_copy)

    def _gone(self, key: int, size: int, is_copy: bool) -> None:
        self._alive.discard(key)
        self.now -= size
        self.copies -= size * is_copy


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
