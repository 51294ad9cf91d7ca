"""Watches the ranks of a run that this process started, until all have ended."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from xtuner_lite.processes import is_running

#: Seconds that ranks get to end by themselves after one failed, by what they agreed on: a rank that
#: raised is to tell its error; one that hangs has used up its time.
GRACE_S = {"error": 6.0, "undecided": 4.0, "else": 2.0}
_POLL_S = 0.02


class Supervisor:
    """Watches the ranks of this machine until all have ended; sees to it that they do.

    Args:
        folder: the launch folder.
        nproc: ranks on this machine.
        agent: what starts them: start(), is_alive(), exit_codes(), error.
    """

    def __init__(self, folder: Path, nproc: int, agent: Any) -> None:
        self._folder, self._nproc, self._agent = folder, nproc, agent
        self._pids: dict[int, int] = {}  # rank -> pid
        # Rank -> exit code, in the order of their ends; None: the agent took it, and will tell it.
        self._ended: dict[int, int | None] = {}
        self._signals: list[int] = []
        self._forwarded = 0
        self._failure: dict[str, Any] | None = None  # what the ranks agreed on
        self._kill_at: float | None = None

    def run(self) -> int:
        """Start, watch, tidy up; returns the exit code."""
        before: dict[int, Any] = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, self._note)
        try:
            self._agent.start()
            while self._agent.is_alive() and not self._is_over():
                self._look()
                time.sleep(_POLL_S)
            self._look()
        finally:
            self._kill()
            for number, handler in before.items():
                signal.signal(number, handler)
        return self._result()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def _look(self) -> None:
        for path in self._folder.glob("rank_*.json"):
            rank = int(path.stem.removeprefix("rank_"))
            if rank not in self._pids and (entry := _read(path)) is not None:
                self._pids[rank] = entry["pid"]
        for rank, pid in self._pids.items():
            if rank not in self._ended:
                ended, code = _has_ended(pid)
                if ended:
                    self._note_end(rank, pid, code)
        self._forward_signals()
        if self._failure is None and (failure := _read(self._folder / "failure.json")) is not None:
            self._failure = failure
            self._kill_in(GRACE_S.get(failure["kind"], GRACE_S["else"]))
        elif self._kill_at is None and any(self._ended.values()):
            self._kill_in(GRACE_S["undecided"])
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            self._kill()

    def _kill_in(self, seconds: float) -> None:
        self._kill_at = time.monotonic() + seconds

    def _is_over(self) -> bool:
        """All is killed, and what started it waits for something else, e.g. other machines."""
        if self._kill_at is None or time.monotonic() < self._kill_at + 2.0:
            return False
        return self._pids.keys() <= self._ended.keys()

    def _note_end(self, rank: int, pid: int, code: int | None) -> None:
        is_first_failure = bool(code) and not any(self._ended.values())
        self._ended[rank] = code
        if is_first_failure or not code:
            notice = json.dumps({"rank": rank, "pid": pid, "exit_code": code})
            temporary = self._folder / f"died_{rank}.tmp"
            temporary.write_text(notice)
            temporary.rename(self._folder / f"died_{rank}.json")
        _kill_group(pid)  # its loader workers

    def _forward_signals(self) -> None:
        while self._forwarded < len(self._signals):
            number = self._signals[self._forwarded]
            self._forwarded += 1
            name = signal.Signals(number).name
            if self._forwarded > 1:
                say(f"{name} again: the processes are killed")
                self._kill_in(0.0)
                return
            say(f"{name}: the processes finish their step, save and end; once more kills them")
            for rank, pid in self._pids.items():
                if rank not in self._ended:
                    _signal(pid, number)
            if len(self._pids) < self._nproc:  # they are only starting: nothing to save
                self._kill_in(GRACE_S["undecided"])

    def _kill(self) -> None:
        for rank, pid in self._pids.items():
            if rank not in self._ended:
                _kill_group(pid)

    def _result(self) -> int:
        codes = {**self._ended, **self._agent.exit_codes()}  # in the order of their ends
        codes.update((rank, code) for rank, code in self._ended.items() if code is not None)
        failed = [(rank, code) for rank, code in codes.items() if code]
        interrupted = [_read(path) for path in sorted(self._folder.glob("interrupted_*.json"))]
        if not failed and interrupted:
            return 128 + interrupted[0]["signal"]
        failure = self._failure
        if self._signals and failure is None:
            return 128 + self._signals[0]
        if failure is None and not failed:
            if self._agent.error is not None:
                say(f"the processes could not be started: {self._agent.error}")
                return 1
            return 0
        rank, code = failed[0] if failed else (failure["rank"], 1)
        how = how_it_ended(code)
        if failure is not None:
            rank = failure["rank"]
            code = failure["exit_code"] if failure["kind"] in ("error", "died") else 1
            how = _HOW.get(failure["kind"]) or how_it_ended(code)
        say(f"rank {rank} {how}; every process of this machine has ended")
        return 128 - code if code < 0 else (code or 1)


_HOW = {
    "error": "failed first, by the error above",
    "hang": "did not arrive, as told above",
    "vanished": "stopped answering, as told above",
    "store": "or its host does not answer any more, as told above",
    "communication": "lost the connection to other ranks, as told above",
}


def how_it_ended(code: int) -> str:
    """'was killed by SIGKILL', 'ended with exit code 3'."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


# --- processes


def _has_ended(pid: int) -> tuple[bool, int | None]:
    """(whether a child ended, its exit code or None where another took it), without reaping it."""
    if not hasattr(os, "waitid"):
        return not is_running(pid), None
    try:
        info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return True, None
    if info is None:
        return False, None
    return True, info.si_status if info.si_code == os.CLD_EXITED else -info.si_status


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _kill_group(pid: int) -> None:
    """SIGKILL what is in the process group that ``pid`` leads, if it leads one."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def say(text: str) -> None:
    print(f"xtuner-lite: {text}", file=sys.stderr, flush=True)
