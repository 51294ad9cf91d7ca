"""Memory that was freed and that the process would still hold."""

from __future__ import annotations

import ctypes
import gc
import sys
from typing import Any

from torch import nn

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_MAPPED_BYTES = 128 * 1024  # its own threshold, before it grows


def give_back_freed_memory() -> None:
    """Hands freed heap memory back to the system, where the C library can (glibc).

    Quantising a model layer by layer leaves as many holes in the heap as there are layers: hundreds
    of MiB for a model of 135 million parameters, which would count as the process's until its end.
    """
    gc.collect()
    if (trim := _of_c_library("malloc_trim")) is not None:
        trim(0)


def give_back_large_blocks_at_once() -> None:
    """From now on what is freed in blocks of 128 KiB or more goes back to the system at once.

    glibc raises this threshold to as much as 32 MiB as a program frees large blocks; between such
    blocks in the heap lie holes that nothing else fits in. Training SmolLM2-135M on a CPU held
    1589 MiB so, and 1112 MiB with this (docs/experiments.md). It costs the system's work of mapping
    pages anew, so it is done where memory is what matters: for quantised models on a CPU.
    """
    if (mallopt := _of_c_library("mallopt")) is not None:
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)


def let_go_of_weight_files(model: nn.Module) -> None:
    """Copies the parameters that were not quantised out of the mapped weight files.

    As long as one tensor lies in a mapped file, every page of it that was read, of weights that are
    long quantised too, counts as the process's memory.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.dtype.is_floating_point:
            parameter.data = parameter.data.clone()


def _of_c_library(name: str) -> Any | None:
    """A function that glibc has and other C libraries (musl, macOS's) have not."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
