"""Ends a run of several processes when one of them fails, and says which one and why.

A rank whose peer is gone waits, in gloo or NCCL, until their own time-out, half an hour by default;
nothing tells which rank was missing. Here each rank has two daemon threads. One exchanges
heartbeats over the store of the process group (engine.watchdog_line). The other judges what it
reads (the rules: engine.watchdog_blame) and ends the process, whatever the main thread waits for:

- a rank's error is known to all within a second; the first one told is the one that counts;
- where no rank gets further for ``timeout_s``, the rank that stayed behind is named with its stack;
- a rank without a sign of life, or a store that does not answer, is named with its host.
"""

from __future__ import annotations

import atexit
import faulthandler
import itertools
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch.distributed import Store

from xtuner_lite.engine.distributed import DEFAULT_TIMEOUT_S
from xtuner_lite.engine.faults import (
    Failure,
    exit_code_of,
    forked_children_die_with_us,
    is_secondary,
    kill_children,
    process_state,
    stack_of,
    write_once,
)
from xtuner_lite.engine.watchdog_blame import (
    PATIENCE_S,
    Beat,
    any_lost,
    find_lost,
    find_silent,
    find_stalled,
)
from xtuner_lite.engine.watchdog_line import BEAT_S, Line
from xtuner_lite.engine.watchdog_notices import Notices

_TICK_S = 0.2
#: A pause of our own thread beyond this is the machine's (suspended, stopped), not the run's.
_PAUSE_S = 3.0
#: The store may live in rank 0's process: before it ends, the others get this long to read it.
_READ_S = 2.5 * BEAT_S
#: How long a rank that failed may take to leave by itself.
_LEAVE_S = 5.0

_numbers = itertools.count()


class Watchdog:
    """Watches one rank and, on rank 0, all of them. In a run of one process it does nothing.

    Every rank makes one at the same point of the program, after init_process_group.

    Args:
        rank, world_size, local_rank: of this process.
        timeout_s: seconds without a mark on any rank after which the run ends.
        store: of the process group (any connection to it; our own is made from it). None: the
            default group's.
        log_dir: failure.txt is written there; it may be set later, as an attribute.
        host: name of this machine in messages.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        local_rank: int | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        store: Store | None = None,
        log_dir: str | Path | None = None,
        host: str | None = None,
    ) -> None:
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self.local_rank = (
            int(os.environ.get("LOCAL_RANK", "0")) if local_rank is None else local_rank
        )
        self.host = host or socket.gethostname()
        self.log_dir = log_dir
        self._mark: tuple[str, int | None, int, float] = ("starting", None, 0, time.monotonic())
        self._limit_s = timeout_s
        self._main, self._pid = threading.get_ident(), os.getpid()
        self._state, self._lost_text, self._lost_at = "running", "", 0.0
        self._beats = itertools.count()
        self._closing = threading.Event()
        self._leaving: tuple[float, int] | None = (
            None  # (since when, exit code): failed() was called
        )
        self._tick = time.monotonic()
        self._notices = Notices(rank, self.host)
        self._line: Line | None = None
        if world_size > 1:
            prefix = f"xtuner_lite/watchdog/{next(_numbers)}"
            self._line = Line(store or _default_store(), prefix, rank, world_size, self._beat)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    # --- for the main thread

    def start(self) -> None:
        """Begin to watch."""
        if self._line is None:
            return
        forked_children_die_with_us()
        atexit.register(self._left)
        self._line.start()
        self._thread.start()

    def close(self) -> None:
        """This rank finished well. Rank 0 goes on watching until the others have finished too."""
        if self._line is None or self._closing.is_set() or not self._thread.is_alive():
            return
        atexit.unregister(self._left)
        self._state = "done"
        self._line.hurry()
        while self.rank == 0 and not self._line.others_are_done() and self._line.error is None:
            self._line.hurry()
            time.sleep(0.02)
        self._closing.set()
        self._thread.join(timeout=1.0)
        self._line.close()

    def mark(self, what: str, step: int | None = None) -> None:
        """Note that this rank's main thread got here. Costs no I/O: call it often.

        Args:
            what: the phase that begins, e.g. 'reading data'.
            step: the optimizer step, from 1; None keeps the last one.
        """
        _, before, count, _ = self._mark
        self._mark = (what, before if step is None else step, count + 1, time.monotonic())

    @contextmanager
    def slow(self, what: str, limit_s: float = float("inf")) -> Iterator[None]:
        """A phase that may take ``limit_s`` seconds without a mark; ranks that wait for it may too.

        A rank that dies or is stopped in it is still found within ``timeout_s``.
        """
        before, self._limit_s = self._limit_s, limit_s
        self.mark(what)
        try:
            yield
        finally:
            self._limit_s = before
            self.mark(f"after {what}")

    def failed(self, error: BaseException) -> None:
        """This rank ends by ``error``: tell all ranks. Call it, then let the error go its way.

        Where ``error`` only says that another rank is gone, this waits for that rank's name, and
        ends the process with it.
        """
        if self._line is None or self._closing.is_set() or self._leaving or self._state == "done":
            return
        if getattr(error, "signal_number", None) is not None:  # saved and left on a signal
            self.close()
            return
        what, step, _, _ = self._mark
        where = what if step is None else f"step {step}, {what}"
        lines = traceback.format_exception(type(error), error, error.__traceback__)
        text, code = "".join(lines), exit_code_of(error)
        if is_secondary(error):
            self._lost_text, self._lost_at, self._state = text, time.monotonic(), "lost"
            self._line.hurry()
            time.sleep(2 * PATIENCE_S)  # the watching thread ends this process before
            return
        self._leaving = (time.monotonic(), code or 1)
        self._ignore_signals()
        failure = self._failure_of_mine(where, text, code or 1)
        self._line.propose(failure)
        until = time.monotonic() + 4 * BEAT_S
        while self._line.verdict is None and self._line.error is None and time.monotonic() < until:
            time.sleep(0.01)
        verdict = self._line.verdict or failure
        if verdict.rank == self.rank and verdict.kind == "error":
            self._write(verdict)
            if isinstance(error, Exception):  # Python, or the command line, shows it in a moment
                message = (str(error).splitlines() or [""])[0][:200]
                kind = type(error).__name__ + (f": {message}" if message else "")
                _say(f"{verdict.headline()} ({kind}). The run ends on all ranks.")
            else:  # sys.exit: nobody shows where
                _say(verdict.describe())
            if self.rank == 0:
                time.sleep(_READ_S)

    # --- the watching thread

    def _watch(self) -> None:
        self._tick = time.monotonic()
        ticks = itertools.count()
        while True:
            if next(ticks) % 5 == 0:
                # Should the main thread hold Python's lock for good, this still shows where.
                faulthandler.dump_traceback_later(0.9 * self.timeout_s, file=2)
            if self._closing.wait(_TICK_S):
                break
            self._forgive_a_pause()
            verdict = self._line.verdict or self._judge()
            if verdict is not None:
                self._end(verdict)
        faulthandler.cancel_dump_traceback_later()

    def _judge(self) -> Failure | None:
        """Why the run must end, as far as this rank knows; None while all is well."""
        line, now = self._line, time.monotonic()
        if self._leaving is not None:
            if now - self._leaving[0] > _LEAVE_S:
                self._exit(self._leaving[1])
            return None
        if (death := self._notices.read(self._line)) is not None:
            return death
        if line.error is not None:
            return self._without_store(now)
        if now - line.last_ok > self.timeout_s:
            return self._store_failure(f"It has not answered for {now - line.last_ok:.0f} s.")
        if self._lost_at or any_lost(line.seen):
            self._lost_at = self._lost_at or now
            if (failure := find_lost(line.seen, now, now - self._lost_at)) is not None:
                return failure
            if now - self._lost_at > 1.5 * PATIENCE_S and self._state == "lost":
                return self._failure_of_mine(self._where(), self._lost_text, 1, "communication")
            return None
        judge = find_stalled if self.rank == 0 else find_silent  # who sees all ranks judges all
        return judge(line.seen, now, self.timeout_s)

    def _end(self, verdict: Failure) -> None:
        """Agree on the verdict, say it where this rank is the one to, and end the process."""
        line = self._line
        if line.verdict is None and verdict.kind == "vanished" and self._notices.has(verdict.rank):
            verdict.text = f"{verdict.text} {process_state(verdict.pid)}".rstrip()
        if line.verdict is None and verdict.kind != "store":
            line.propose(verdict)
            until = time.monotonic() + 3 * BEAT_S
            while line.verdict is None and line.error is None and time.monotonic() < until:
                time.sleep(0.02)
            verdict = line.verdict or verdict
        verdict.world_size = self.world_size
        mine = verdict.rank == self.rank
        if mine and self._leaving is not None:  # the main thread is on its way out
            if time.monotonic() - self._leaving[0] > _LEAVE_S:
                self._exit(self._leaving[1])
            return
        self._write(verdict)
        if self._is_the_one_to_say(verdict):
            _say(verdict.describe())
        if self.rank == 0:
            time.sleep(_READ_S)
        self._exit(max(1, verdict.exit_code) if mine else 1)

    def _exit(self, code: int) -> None:
        kill_children()
        # The main thread may hold a stream's lock for good: flush, but do not wait for it.
        flush = threading.Thread(target=sys.stdout.flush, daemon=True)
        flush.start()
        flush.join(0.5)
        os._exit(code)

    def _ignore_signals(self) -> None:
        """What ended the others' processes, or our loader workers, must not stop us telling why."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def _is_the_one_to_say(self, verdict: Failure) -> bool:
        """One rank of each host says it, and not one that said it already or cannot."""
        if verdict.rank == self.rank:
            return False
        here = verdict.host in ("", self.host)
        if here and verdict.kind == "error":
            return False  # the rank at fault told it itself
        if not here:
            return self.local_rank == 0
        culprit = verdict.rank - (self.rank - self.local_rank)  # its local rank
        return self.local_rank == (1 if culprit == 0 else 0)

    def _forgive_a_pause(self) -> None:
        now = time.monotonic()
        pause = now - self._tick - _TICK_S
        self._tick = now
        if pause > _PAUSE_S:
            self._line.forgive(pause)
            what, step, count, since = self._mark
            if now - since >= pause:
                self._mark = (what, step, count, since + pause)

    # --- what this rank knows

    def _beat(self) -> Beat:
        what, step, count, since = self._mark
        age_s = time.monotonic() - since
        stack, waiting = self._lost_text, False
        if self._state == "running" and age_s > 0.5 * min(self._limit_s, 2 * self.timeout_s):
            stack, waiting = stack_of(self._main)
        return Beat(
            self.rank, self.host, self._pid, next(self._beats), what, step, count,
            age_s, self._limit_s, self._state, waiting, stack,
        )  # fmt: skip

    def _where(self) -> str:
        what, step, _, _ = self._mark
        return what if step is None else f"step {step}, {what}"

    def _failure_of_mine(self, where: str, text: str, code: int, kind: str = "error") -> Failure:
        return Failure(kind, self.rank, self.host, self._pid, where, text, code, self.world_size)

    def _without_store(self, now: float) -> Failure | None:
        text, since = self._line.error
        if self._line.others_are_done() or self._state == "done":
            self._closing.set()  # nobody is left to be watched
            return None
        if now - since < 3 * BEAT_S:
            return None  # time for a notice of the launcher
        return self._store_failure(f"The connection to it ended: {text}.")

    def _store_failure(self, text: str) -> Failure:
        address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        beat = self._line.seen[0].beat
        where = f" Its last known place: {beat.where}." if beat and self.rank != 0 else ""
        host, pid = (beat.host, beat.pid) if beat and self.rank != 0 else ("", 0)
        text = f"The ranks' meeting point is {address}. {text}{where} This is rank {self.rank} on "
        return Failure("store", 0, host, pid, text=f"{text}{self.host}, at {self._where()}.")

    def _write(self, verdict: Failure) -> None:
        self._notices.write(verdict)
        if self.log_dir is not None:
            write_once(Path(self.log_dir) / "failure.txt", verdict.describe() + "\n")

    def _left(self) -> None:
        """At exit: the process ends in the middle of the run, and nobody told why."""
        if os.getpid() == self._pid:
            self.failed(SystemExit("the program ended (sys.exit?) before the run had finished"))


def _default_store() -> Store:
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def _say(text: str) -> None:
    # Not through sys.stderr: the main thread may hold its lock for good.
    with suppress(OSError):
        os.write(2, f"xtuner_lite: {text}\n".encode(errors="replace"))
