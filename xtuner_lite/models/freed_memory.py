"""Memory that was freed and that the process still holds."""

from __future__ import annotations

import ctypes
import gc
import sys


def give_back_freed_memory() -> None:
    """Hands freed heap memory back to the system, where the C library can (glibc).

    Quantising a model layer by layer leaves as many holes in the heap as there are layers: hundreds
    of MiB for a model of 135 million parameters, which would count as the process's until its end.
    """
    gc.collect()
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    if trim is not None:
        trim(0)
