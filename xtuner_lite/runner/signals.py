"""SIGTERM and Ctrl-C during training: finish the step, save, leave with the field's exit code."""

from __future__ import annotations

import signal
from types import FrameType


class TrainingInterrupted(SystemExit):
    """Training ended on a signal after saving; ``code`` is 128 + the signal's number (143, 130)."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)
        self.signal_number = signal_number


class SignalWatch:
    """Remembers the first SIGTERM or SIGINT; a second one takes its usual course at once."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> SignalWatch:
        self.received = None
        for number in self.SIGNALS:
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: the program that embeds us owns the signals
                break
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self._before[number])
