"""What is known of a rank that failed, and leaving no process behind when a run must end.

Used by engine.watchdog. Nothing here talks to other ranks.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal

import torch.distributed as dist

#: Folder that ``--nproc`` gives its ranks: their pids, how each ended, the failure they agreed on.
LAUNCH_DIR = "XTUNER_LITE_LAUNCH_DIR"

FAILURE_FILE = "failure.json"

#: What the errors of a rank say whose peer has gone; the peer's own failure is the one to tell.
_PEER_WORDS = re.compile(
    r"gloo/transport|\[gloo|NCCL|Connection (closed by peer|reset by peer|refused)|"
    r"Socket (Timeout|closed)|Broken pipe|recvValue failed|is killed by signal: Terminated"
)

#: Files of torch that pass a call on: who called them tells what is waited for.
_PASSING_ON = ("torch/_ops.py", "torch/utils/_contextlib.py", "torch/_tensor.py", "/contextlib.py")
_COMMUNICATION = ("torch/distributed/", "torch/nn/parallel/distributed.py", "deepspeed/comm/")


@dataclass
class Failure:
    """Why a run of several processes ends; agreed on by all ranks, first come first served.

    Attributes:
        kind: 'error' (it raised or exited), 'hang' (it did not arrive), 'vanished' (no sign of life
            any more), 'died' (the launcher saw its process end), 'store' (rank 0's host does not
            answer), 'communication' (ranks lost each other and none is known to be at fault).
        rank, host, pid: of the rank at fault; host and pid are '' and 0 where they are not known.
        where: what it did last, e.g. 'step 7, reading data'.
        text: its traceback, its main thread's stack, or what is known.
        exit_code: which its process ends with, or ended with (-9: by signal 9).
        others: a line per other rank: where it is.
    """

    kind: Literal["error", "hang", "vanished", "died", "store", "communication"]
    rank: int
    host: str = ""
    pid: int = 0
    where: str = ""
    text: str = ""
    exit_code: int = 1
    world_size: int = 0
    others: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """For the store and for FAILURE_FILE."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Failure:
        """The inverse of to_json."""
        return cls(**json.loads(text))

    @property
    def who(self) -> str:
        """'rank 1 of 2 (host b, pid 4242)'."""
        total = f" of {self.world_size}" if self.world_size else ""
        known = [f"host {self.host}"] if self.host else []
        known += [f"pid {self.pid}"] if self.pid else []
        return f"rank {self.rank}{total}" + (f" ({', '.join(known)})" if known else "")

    def headline(self) -> str:
        """One line: which rank, and what happened to it."""
        at = f", at {self.where}" if self.where else ""
        last = f", last heard of at {self.where}" if self.where else ""
        told = {
            "error": f"failed first{at}",
            "hang": f"did not arrive{at}",
            "vanished": f"stopped answering{last}",
            "died": f"{how_it_ended(self.exit_code)}{last}",
            "store": "or its host does not answer any more",
            "communication": f"lost the connection to other ranks{at}",
        }
        return f"{self.who} {told[self.kind]}"

    def describe(self) -> str:
        """The whole message, several lines."""
        lines = [self.headline() + (":" if self.text else ".")]
        if self.text:
            lines.append(self.text.rstrip())
        if self.others:
            lines += ["The other ranks:", *(f"  {line}" for line in self.others)]
        lines.append("The run ends on all ranks.")
        return "\n".join(lines)


def how_it_ended(exit_code: int | None) -> str:
    """'was killed by SIGKILL', 'ended with exit code 3', as waitpid tells it."""
    if exit_code is None:
        return "ended"
    if exit_code < 0:
        try:
            return f"was killed by {signal.Signals(-exit_code).name}"
        except ValueError:
            return f"was killed by signal {-exit_code}"
    return f"ended with exit code {exit_code} in the middle of the run"


def exit_code_of(error: BaseException) -> int:
    """What Python would end a process with that ``error`` leaves."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if not isinstance(error, SystemExit):
        return int(getattr(error, "exit_code", 1))
    if error.code is None:
        return 0
    return error.code if isinstance(error.code, int) else 1


def is_secondary(error: BaseException) -> bool:
    """Whether ``error`` only tells that another rank is gone (or failed: PeerError)."""
    from xtuner_lite.engine.distributed import PeerError

    if isinstance(error, (PeerError, dist.DistError)):
        return True
    return isinstance(error, RuntimeError) and bool(_PEER_WORDS.search(str(error)))


def stack_of(thread: int) -> tuple[str, bool]:
    """(stack of a thread of this process, whether it waits in a communication between ranks).

    On a GPU a rank that waits for others may stand in any line that reads a result; then the second
    is False for all ranks.
    """
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "", False
    return "".join(traceback.format_stack(frame)), _is_communication(frame)


def _is_communication(frame: FrameType | None) -> bool:
    while frame is not None:
        name = frame.f_code.co_filename.replace(os.sep, "/")
        if not name.endswith(_PASSING_ON):
            in_backward = frame.f_code.co_name == "_engine_run_backward"
            return in_backward or any(part in name for part in _COMMUNICATION)
        frame = frame.f_back
    return False


def write_once(path: Path, text: str) -> bool:
    """Write a small file whole, unless it is there already; whether this call wrote it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.link(temporary, path)
    except OSError:  # it is there; or the disk is full, which must not stop the end of a run
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def process_state(pid: int) -> str:
    """What Linux says of a process of this machine, as a sentence; '' where it cannot be told."""
    if not Path("/proc/self/stat").exists():
        return ""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return f"The process {pid} is gone."
    told = {
        "Z": "has ended", "X": "has ended", "T": "is stopped (SIGSTOP)", "t": "is stopped (traced)",
        "R": "is running", "S": "is sleeping", "D": "waits for a device or a disk",
    }  # fmt: skip
    return f"The process {pid} {told.get(state, 'is in state ' + state)}."


# --- no process left behind


def kill_children() -> None:
    """SIGKILL every descendant of this process: loader workers, and what they started."""
    for child in multiprocessing.active_children():
        child.kill()
    for pid in _descendants(os.getpid()):
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            continue


def _descendants(root: int) -> list[int]:
    """Pids, on Linux; Python's resource tracker, which tidies up and ends by itself, is none."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if b"resource_tracker" not in (folder / "cmdline").read_bytes():
                children.setdefault(parent, []).append(int(folder.name))
        except (OSError, ValueError, IndexError):
            continue
    found, queue = [], [root]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


_libc: ctypes.CDLL | None = None
_forking: tuple[bool, int] = (False, 0)  # from the main thread?, by which process


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """On Linux: this process gets signal ``number`` when the thread that started it ends."""
    if (libc := _load_libc()) is not None:
        libc.prctl(1, int(number), 0, 0, 0)  # PR_SET_PDEATHSIG


def forked_children_die_with_us() -> None:
    """From now on, on Linux, a child forked by the main thread (a loader worker) outlives nobody.

    A worker that hangs does not notice by itself that its rank was killed.
    """
    if _load_libc() is None or getattr(forked_children_die_with_us, "installed", False):
        return
    forked_children_die_with_us.installed = True
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


def _before_fork() -> None:
    global _forking
    _forking = threading.current_thread() is threading.main_thread(), os.getpid()


def _after_fork() -> None:
    from_main, parent = _forking
    if from_main:
        die_with_parent()
        if os.getppid() != parent:  # it ended between the fork and here
            os._exit(1)


def _load_libc() -> ctypes.CDLL | None:
    global _libc
    if _libc is None and sys.platform.startswith("linux"):
        _libc = ctypes.CDLL(None)
    return _libc
