"""Where files that can be made again are kept on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """$XTUNER_LITE_HOME, else xtuner_lite in the user's cache folder ($XDG_CACHE_HOME)."""
    if home := os.environ.get("XTUNER_LITE_HOME"):
        return Path(home).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "xtuner_lite"


def data_cache_dir() -> Path:
    """Where prepared data sets are kept: $XTUNER_LITE_DATA_CACHE, else 'data' in cache_dir()."""
    if folder := os.environ.get("XTUNER_LITE_DATA_CACHE"):
        return Path(folder).expanduser()
    return cache_dir() / "data"
