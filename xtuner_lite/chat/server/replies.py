"""Replies in turn: one thread asks the model, any number of requests wait or read along."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from xtuner_lite.models.generate import generate_reply
from xtuner_lite.models.sampling import ReplyStats, Sampling

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from xtuner_lite.structures import Message

logger = logging.getLogger(__name__)


class LineFull(Exception):
    """As many requests wait as may wait.

    Args:
        retry_after_s: when to try again: as long as the last reply took.
    """

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the line is full; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class ServerStops(Exception):
    """The server ends before the reply does."""


class Reply:
    """One reply, from the line to its last piece. Made and read in the event loop's thread."""

    def __init__(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, sampling: Sampling
    ) -> None:
        self.messages = messages
        self.tools = tools
        self.sampling = sampling
        self.stats = ReplyStats()
        self.should_stop = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[str | BaseException | None] = asyncio.Queue()

    async def pieces(self) -> AsyncIterator[str]:
        """The reply's text as it is made.

        Raises:
            ServerStops: the server ends.
            Exception: what the generation failed with.
        """
        while (event := await self._events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event

    def put(self, event: str | BaseException | None) -> None:
        """A piece, a failure, or None for the end; from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


class ReplyLine:
    """Makes replies one after the other, in the order of arrival, in a thread of its own.

    Args:
        model: a causal language model, or a PeftModel around one.
        tokenizer: carries the chat template.
        max_waiting: requests that may wait beside the one that is answered.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, max_waiting: int
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_waiting = max_waiting
        self._changed = threading.Condition()
        self._waiting: deque[Reply] = deque()
        self._running: Reply | None = None
        self._is_closed = False
        self._last_s = 1.0
        # A daemon: reading a long prompt cannot be broken off, and must not keep the process.
        self._thread = threading.Thread(target=self._work, name="replies", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Requests in the line, without the one that is answered."""
        return len(self._waiting)

    def check_room(self) -> None:
        """Raises LineFull or ServerStops where :meth:`join` would."""
        if self._is_closed:
            raise ServerStops("the server is shutting down")
        if len(self._waiting) + (self._running is not None) > self.max_waiting:
            raise LineFull(min(60, math.ceil(self._last_s)))

    def join(self, reply: Reply) -> None:
        """Puts a reply at the end of the line.

        Raises:
            LineFull: as many as may wait are waiting.
            ServerStops: the line is closed.
        """
        with self._changed:
            self.check_room()
            self._waiting.append(reply)
            self._changed.notify()

    def leave(self, reply: Reply) -> None:
        """Ends a reply: at once while it waits, else after its current token."""
        reply.should_stop.set()
        with self._changed, contextlib.suppress(ValueError):
            self._waiting.remove(reply)

    def close(self) -> None:
        """Ends every reply; nobody may join any more."""
        with self._changed:
            self._is_closed = True
            waiting = [*self._waiting]
            self._waiting.clear()
            running = self._running
            self._changed.notify()
        for reply in waiting if running is None else [running, *waiting]:
            reply.should_stop.set()
            reply.put(ServerStops("the server is shutting down"))

    def wait_closed(self, timeout_s: float) -> bool:
        """Whether the thread has ended within that time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._running = None
                while not self._waiting and not self._is_closed:
                    self._changed.wait()
                if self._is_closed:
                    return
                reply = self._running = self._waiting.popleft()
            started = time.monotonic()
            self._make(reply)
            self._last_s = time.monotonic() - started

    def _make(self, reply: Reply) -> None:
        if reply.should_stop.is_set():  # left between the line and here
            return reply.put(None)
        try:
            generate_reply(
                self.model,
                self.tokenizer,
                reply.messages,
                tools=reply.tools,
                should_stop=reply.should_stop,
                stats=reply.stats,
                on_text=reply.put,
                **asdict(reply.sampling),
            )
        except Exception as error:  # told to the client; the next request is served
            logger.exception("a reply failed")
            reply.put(error)
        else:
            reply.put(None)
