"""The thread that tells a rank's beats to the store and reads what the others told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from torch.distributed import Store

from xtuner_lite.engine.faults import Failure
from xtuner_lite.engine.watchdog_blame import Beat, Seen

BEAT_S = 0.5


class Line:
    """A rank's line to the others, over its own connection to the store.

    The rank 0 reads all beats and judges; the others read rank 0's, so that the load of the store
    grows with the number of ranks, not with its square. A call to a store whose host is cut off
    blocks: only this thread makes them.

    Args:
        store: of the process group; cloned.
        prefix: of our keys.
        rank, world_size: of this process.
        make_beat: what to tell now.
    """

    def __init__(
        self,
        store: Store,
        prefix: str,
        rank: int,
        world_size: int,
        make_beat: Callable[[], Beat],
    ) -> None:
        self._store = store.clone()
        self._prefix, self._rank, self._make_beat = prefix, rank, make_beat
        now = time.monotonic()
        read = range(world_size) if rank == 0 else range(1)
        self.seen = {other: Seen(now) for other in read}
        self.verdict: Failure | None = None
        self.error: tuple[str, float] | None = None  # why the store was lost, and when
        self.last_ok = now
        self.num_exchanges = 0
        self._proposal: Failure | None = None
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog-line", daemon=True)

    def start(self) -> None:
        """Begin to exchange."""
        self._thread.start()

    def close(self, timeout_s: float = 1.0) -> None:
        """End the thread; a call to a dead store may outlast ``timeout_s``, and is left behind."""
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout_s)

    def propose(self, failure: Failure) -> None:
        """Tell why the run must end; ``verdict`` becomes this or what another rank told before."""
        self._proposal = failure
        self._wake.set()

    def hurry(self) -> None:
        """Exchange now."""
        self._wake.set()

    def others_are_done(self) -> bool:
        """Whether every other rank that we read of has finished well."""
        return all(entry.is_done for rank, entry in self.seen.items() if rank != self._rank)

    def forgive(self, pause_s: float) -> None:
        """We did not look for ``pause_s``: nobody was silent then."""
        for entry in list(self.seen.values()):
            entry.changed += pause_s
        self.last_ok += pause_s

    def _run(self) -> None:
        while self.error is None:
            stopping = self._stop.is_set()
            try:
                self._exchange()
            except Exception as error:
                text = str(error).splitlines()[0] if str(error) else type(error).__name__
                self.error = (text, time.monotonic())
            if stopping:
                return
            self._wake.wait(BEAT_S)
            self._wake.clear()

    def _exchange(self) -> None:
        store, verdict_key = self._store, f"{self._prefix}/verdict"
        store.set(self._key(self._rank), self._make_beat().to_json())
        if self.verdict is None and self._proposal is not None:
            told = store.compare_set(verdict_key, "", self._proposal.to_json())
            self.verdict = Failure.from_json(told)
        elif self.verdict is None and store.check([verdict_key]):
            self.verdict = Failure.from_json(store.get(verdict_key))
        known = [rank for rank, entry in self.seen.items() if self._is_known(rank, entry)]
        texts = store.multi_get([self._key(rank) for rank in known]) if known else []
        now = time.monotonic()
        for rank, text in zip(known, texts, strict=True):
            beat, before = Beat.from_json(text), self.seen[rank].beat
            if before is None or beat.number != before.number:
                self.seen[rank] = Seen(now, beat)
        self.last_ok = now
        self.num_exchanges += 1

    def _is_known(self, rank: int, entry: Seen) -> bool:
        return entry.beat is not None or self._store.check([self._key(rank)])

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/beat/{rank}"
