"""Which rank is at fault, judged from what each says about itself. No I/O: rules only.

A run hangs when no rank gets further. Ranks that wait in a communication are victims; the one to
name is the rank that is silent (stopped, killed, cut off), else the one whose main thread stands
elsewhere, else one that has finished while others wait, else the one that is furthest behind.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from xtuner_lite.engine.faults import Failure

#: Seconds without a heartbeat after which a rank that others lost counts as gone.
SILENT_S = 3.0
#: Seconds in which a rank that lost its peers waits for the one at fault to be found.
PATIENCE_S = 6.0
_MAX_OTHERS = 8


@dataclass
class Beat:
    """What a rank tells about itself, again and again.

    Attributes:
        number: counts the beats; one that stands still is a rank without a sign of life.
        what, step, marks: its last mark, and how many it made.
        age_s: seconds since that mark.
        limit_s: seconds that its current phase may take without a mark.
        state: 'running'; 'lost': an error says that peers are gone; 'done': it finished well.
        waiting: whether its main thread waits in a communication.
        stack: of its main thread once it stands still; its error where it is 'lost'.
    """

    rank: int
    host: str
    pid: int
    number: int = 0
    what: str = "starting"
    step: int | None = None
    marks: int = 0
    age_s: float = 0.0
    limit_s: float = 0.0
    state: Literal["running", "lost", "done"] = "running"
    waiting: bool = False
    stack: str = ""

    def to_json(self) -> str:
        """For the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Beat:
        """The inverse of to_json."""
        return cls(**json.loads(text))

    @property
    def where(self) -> str:
        """'step 7, reading data'."""
        return self.what if self.step is None else f"step {self.step}, {self.what}"


@dataclass
class Seen:
    """The last beat of a rank, and when (monotonic clock of the reader) it was seen to change.

    ``beat`` is None while the rank has said nothing; then ``changed`` is when we began to look.
    """

    changed: float
    beat: Beat | None = None

    def silent_s(self, now: float) -> float:
        """Seconds without a sign of life."""
        return now - self.changed

    @property
    def is_done(self) -> bool:
        """Whether the rank finished well."""
        return self.beat is not None and self.beat.state == "done"


def find_silent(seen: Mapping[int, Seen], now: float, limit_s: float) -> Failure | None:
    """The rank that is silent the longest, if longer than ``limit_s``.

    Args:
        seen: rank -> its last beat.
        now: monotonic clock.
        limit_s: seconds without a sign of life.
    """
    running = {rank: entry for rank, entry in seen.items() if not entry.is_done}
    worst = max(running, key=lambda rank: running[rank].silent_s(now), default=None)
    if worst is None or running[worst].silent_s(now) <= limit_s:
        return None
    return _vanished(worst, seen, now)


def find_stalled(seen: Mapping[int, Seen], now: float, timeout_s: float) -> Failure | None:
    """The rank at fault if a rank is silent for ``timeout_s``, or if none gets further.

    Args:
        seen: every rank -> its last beat.
        now: monotonic clock.
        timeout_s: how long a rank may be silent.
    """
    if (failure := find_silent(seen, now, timeout_s)) is not None:
        return failure
    running = {rank: entry for rank, entry in seen.items() if not entry.is_done}
    if not running or not all(_is_over(entry.beat) for entry in running.values()):
        return None
    if (failure := find_silent(seen, now, SILENT_S)) is not None:
        return failure
    elsewhere = [rank for rank, entry in running.items() if not entry.beat.waiting]
    if not elsewhere and (failure := _finished_early(seen, now)) is not None:
        return failure
    candidates = elsewhere or list(running)
    rank = min(candidates, key=lambda rank: (_progress(running[rank].beat), rank))
    beat = running[rank].beat
    text = [f"No rank got further within the {beat.limit_s:g} s that this phase may take"]
    text[0] += " (env_cfg.dist_cfg.timeout)." if beat.limit_s == timeout_s else "."
    if not elsewhere and len(running) > 1:
        text.append("Every rank waits for the others; this one is the furthest behind.")
    if beat.stack:
        text.append(f"Its main thread stands here:\n{beat.stack}")
    where = f"{beat.where}, for {beat.age_s:.0f} s"
    others = _others(seen, rank, now)
    return Failure("hang", rank, beat.host, beat.pid, where, "\n".join(text), others=others)


def find_lost(seen: Mapping[int, Seen], now: float, lost_s: float) -> Failure | None:
    """The rank that others lost, once it is silent or they waited long enough.

    Args:
        seen: rank -> its last beat.
        now: monotonic clock.
        lost_s: seconds since the first rank said that it lost its peers.
    """
    if (failure := find_silent(seen, now, SILENT_S)) is not None:
        return failure
    if lost_s < PATIENCE_S:
        return None
    if (failure := _finished_early(seen, now)) is not None:
        return failure
    lost = [entry.beat for _, entry in sorted(seen.items()) if _is_lost(entry)]
    if not lost:
        return None
    beat = lost[0]
    return Failure(
        "communication", beat.rank, beat.host, beat.pid, beat.where, beat.stack,
        others=_others(seen, beat.rank, now),
    )  # fmt: skip


def any_lost(seen: Mapping[int, Seen]) -> bool:
    """Whether a rank says that its peers are gone."""
    return any(_is_lost(entry) for entry in seen.values())


def _is_lost(entry: Seen) -> bool:
    return entry.beat is not None and entry.beat.state == "lost"


def _is_over(beat: Beat | None) -> bool:
    return beat is not None and beat.age_s > beat.limit_s


def _progress(beat: Beat) -> tuple[int, int]:
    return (-1 if beat.step is None else beat.step, beat.marks)


def _finished_early(seen: Mapping[int, Seen], now: float) -> Failure | None:
    """The rank that has finished while others still wait for it."""
    done = [entry.beat for _, entry in sorted(seen.items()) if entry.is_done]
    if not done:
        return None
    beat = min(done, key=_progress)
    text = "It has finished its work and the other ranks have not: they wait for it in vain."
    others = _others(seen, beat.rank, now)
    return Failure("hang", beat.rank, beat.host, beat.pid, beat.where, text, others=others)


def _vanished(rank: int, seen: Mapping[int, Seen], now: float) -> Failure:
    entry = seen[rank]
    silent = f"{entry.silent_s(now):.0f} s"
    if entry.beat is None:
        text = f"It never gave a sign of life ({silent})."
        return Failure("vanished", rank, text=text, others=_others(seen, rank, now))
    beat = entry.beat
    text = (
        f"Its last sign of life was {silent} ago. Its process was killed or stopped, or holds "
        "Python's lock, or its host or the network to it is gone."
    )
    return Failure(
        "vanished", rank, beat.host, beat.pid, beat.where, text, others=_others(seen, rank, now)
    )


def _others(seen: Mapping[int, Seen], culprit: int, now: float) -> list[str]:
    lines = []
    for rank, entry in sorted(seen.items()):
        if rank == culprit:
            continue
        if entry.beat is None:
            lines.append(f"rank {rank}: no sign of life yet")
            continue
        beat, how = entry.beat, ""
        if beat.state == "done":
            how = " (it has finished)"
        elif entry.silent_s(now) > SILENT_S:
            how = f" (silent for {entry.silent_s(now):.0f} s)"
        elif beat.waiting:
            how = " (it waits for other ranks)"
        lines.append(f"rank {rank} on {beat.host}: {beat.where}, for {beat.age_s:.0f} s{how}")
    if len(lines) > _MAX_OTHERS:
        lines = [*lines[:_MAX_OTHERS], f"... and {len(lines) - _MAX_OTHERS} more"]
    return lines
