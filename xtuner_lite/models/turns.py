"""One reply at a time on each model: callers from several threads wait for their turn, in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

#: Seconds after which a waiting call looks whether it is to give up.
_LOOK_S = 0.05


class GaveUpWaiting(Exception):
    """The caller was told to stop before its turn came."""


class Turns:
    """A lock that is handed on in the order of arrival, and for which waiting can be given up."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()  # the first one has its turn

    @contextmanager
    def taken(self, should_stop: threading.Event | None = None) -> Iterator[None]:
        """Waits for the turn and keeps it inside the block.

        Args:
            should_stop: when set, waiting ends.

        Raises:
            GaveUpWaiting: ``should_stop`` was set before the turn came.
        """
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
        try:
            with self._changed:
                while self._queue[0] is not ticket:
                    if should_stop is not None and should_stop.is_set():
                        raise GaveUpWaiting
                    self._changed.wait(_LOOK_S if should_stop is not None else None)
            yield
        finally:
            with self._changed:
                self._queue.remove(ticket)
                self._changed.notify_all()


_TURNS: WeakKeyDictionary[nn.Module, Turns] = WeakKeyDictionary()
_TURNS_LOCK = threading.Lock()


def turns_of(model: nn.Module) -> Turns:
    """The turns of a model, the same ones for every caller."""
    with _TURNS_LOCK:
        return _TURNS.setdefault(model, Turns())
