"""The map function that a config asks for: named, given, or recognised from the rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain, islice
from typing import Any

from mmengine.logging import print_log

from xtuner_lite.data.encode import MapFn
from xtuner_lite.data.map_fns.recognise import NUM_LOOKED_AT, recognise
from xtuner_lite.data.sources import Row
from xtuner_lite.registry import MAP_FNS


def recognised(rows: Iterator[Row], name: str) -> tuple[MapFn, Iterator[Row], list[str]]:
    """The map function for rows of a known format, all the rows again, and why that one."""
    head = list(islice(rows, NUM_LOOKED_AT))
    good = [row.data for row in head if row.error is None]
    if not good and head:
        bad = head[0]
        raise ValueError(
            f"{name}: none of the first {len(head)} rows can be read; the first: "
            f"{bad.place}: {bad.error}. Correct the file."
        )
    map_fn, why, warning = recognise(good, name)
    print_log(why, logger="current", level=logging.INFO)
    if warning:
        print_log(warning, logger="current", level=logging.WARNING)
    return MAP_FNS.get(map_fn), chain(head, rows), [why, warning] if warning else [why]


def map_function(map_fn: Any) -> MapFn:
    """The function that a registered name, a function or dict(type=..., keyword=...) stands for."""
    if isinstance(map_fn, Mapping):
        keywords = {key: value for key, value in map_fn.items() if key != "type"}
        function = map_fn["type"]
        function = MAP_FNS.get(function) if isinstance(function, str) else function
        return partial(_unlazy(function), **keywords)
    return MAP_FNS.get(map_fn) if isinstance(map_fn, str) else _unlazy(map_fn)


def _unlazy(function: Any) -> Callable[..., Any]:
    if not callable(function) and hasattr(function, "build"):  # mmengine's LazyObject
        function = function.build()
    if not callable(function):
        raise TypeError(
            f"map_fn={function!r} cannot be called; give 'auto', a name "
            "(xtuner-lite list map_fns), or a function from a row to dict(messages=...)"
        )
    return function
