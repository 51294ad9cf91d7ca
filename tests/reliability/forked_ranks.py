"""Ranks forked from a process with everything imported, under the launcher's supervisor.

What ``xtuner-lite train --nproc N`` does, less the seconds of its start: each rank is a session of
its own, and what starts them behaves like torch.distributed.run: it sends SIGTERM to the others
once one has failed.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from xtuner_lite.cli._launch import free_port
from xtuner_lite.cli._rank import LAUNCH_DIR
from xtuner_lite.cli._supervisor import Supervisor


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        code: exit code of the launcher.
        output: stderr and stdout of all processes.
        seconds_after: from the moment the fault happened until the launcher had ended; None where
            none happened.
        left_behind: pids that still ran then.
    """

    code: int
    output: str
    seconds_after: float | None
    left_behind: list[int]


class ForkAgent:
    """Starts ``body(rank)`` in forks."""

    def __init__(self, body: Callable[[int], None], nproc: int, folder: Path) -> None:
        self._body, self._nproc, self._folder = body, nproc, folder
        self._codes: dict[int, int] = {}
        self.error = None
        self._thread = threading.Thread(target=self._wait, daemon=True)

    def start(self) -> None:
        port = free_port()
        self._pids = {}
        for rank in range(self._nproc):
            pid = os.fork()
            if pid == 0:
                self._be_rank(rank, port)
            self._pids[rank] = pid
        self._thread.start()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def exit_codes(self) -> dict[int, int]:
        return {rank: code for rank, code in self._codes.items() if code != 0}

    def _be_rank(self, rank: int, port: int) -> None:
        code = 1
        try:
            os.setsid()
            atexit._clear()  # what the process we are forked from has to tidy up is its own
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(self._nproc),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
            )  # fmt: skip
            os.environ[LAUNCH_DIR] = str(self._folder)
            path = self._folder / f"rank_{rank}.json"
            path.with_suffix(".tmp").write_text(json.dumps({"pid": os.getpid()}))
            path.with_suffix(".tmp").rename(path)
            code = _as_python_would(lambda: self._body(rank))
            atexit._run_exitfuncs()
        finally:
            os._exit(code)

    def _wait(self) -> None:
        running = dict(self._pids)
        told = False
        while running:
            time.sleep(0.1)  # as torch.distributed.run's monitor interval
            for rank, pid in list(running.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    del running[rank]
                    self._codes[rank] = os.waitstatus_to_exitcode(status)
            if not told and any(self._codes.values()):
                told = True
                for pid in running.values():
                    os.killpg(pid, signal.SIGTERM)


def _as_python_would(function: Callable[[], None]) -> int:
    try:
        function()
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def note_fault() -> None:
    """Called in a rank (or its loader worker) right before what goes wrong."""
    (Path(os.environ[LAUNCH_DIR]) / "fault_at").write_text(str(time.time()))


def run_forked(body: Callable[[int], None], folder: Path, nproc: int = 2) -> Outcome:
    """Run ``body(rank)`` in ``nproc`` ranks under the launcher's supervisor.

    Args:
        body: what a rank does; its process group is not made yet.
        folder: empty; logs and the launch folder.
    """
    launch_dir = folder / "launch"
    launch_dir.mkdir(parents=True)
    log = folder / "output.txt"
    launcher = os.fork()
    if launcher == 0:
        code = 99
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            code = Supervisor(launch_dir, nproc, ForkAgent(body, nproc, launch_dir)).run()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(launcher, 0)
    ended_at = time.time()
    fault = launch_dir / "fault_at"
    sessions = {json.loads(p.read_text())["pid"] for p in launch_dir.glob("rank_*.json")}
    return Outcome(
        os.waitstatus_to_exitcode(status),
        log.read_text(errors="replace"),
        ended_at - float(fault.read_text()) if fault.exists() else None,
        running_in(sessions),
    )


def running_in(sessions: set[int]) -> list[int]:
    """Pids of the processes of these sessions that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if int(session) in sessions and state not in "ZX":
            found.append(int(stat.parent.name))
    return found


def host() -> str:
    """As the watchdog names it."""
    return socket.gethostname()
