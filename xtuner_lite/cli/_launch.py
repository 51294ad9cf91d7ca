"""``--nproc N``: start the ranks of a run on this machine, watch them, end with their exit code.

The ranks are started by torch.distributed.run, under the same interpreter. What it lacks is done
here: its own exit code is 1 whatever happened, on a signal it kills a rank that saves for longer
than 30 s, and it waits as long for a rank that hangs. So it runs in a thread, and the main thread
has the signals:

- the first SIGTERM or Ctrl-C goes to each rank once; they finish the step, save and end; the exit
  code is 143 or 130. A second one kills them;
- when a rank fails, the others get a few seconds to end by themselves (engine.watchdog), then
  SIGKILL;
- loader workers go with their rank: each rank has a process group of its own.

The ranks know of this through a folder, named by XTUNER_LITE_LAUNCH_DIR:

    rank_0.json           a rank's pid, written when it starts
    died_1.json           how a rank ended, written here
    failure.json          the failure that the ranks agreed on
    interrupted_0.json    a rank saved and left on a signal; its own exit code is then 0, as another
                          would make torch.distributed.run end the ranks that still tidy up
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

LAUNCH_DIR = "XTUNER_LITE_LAUNCH_DIR"
LAUNCHER_PID = "XTUNER_LITE_LAUNCHER_PID"

#: Seconds that ranks get to end by themselves after one failed, by what they agreed on: a rank that
#: raised is to tell its error; one that hangs has used up its time.
GRACE_S = {"error": 6.0, "undecided": 4.0, "else": 2.0}
_POLL_S = 0.02


class LaunchError(ValueError):
    """What was asked for cannot be started."""

    exit_code = 2


@dataclass(frozen=True)
class Plan:
    """Which processes to start here.

    Args:
        nproc: ranks on this machine.
        nnodes: machines of the run.
        node_rank: number of this machine, from 0.
        master_addr: address of machine 0; None on a single machine.
        master_port: a free port of machine 0; None takes one (single machine) or 29500.

    Raises:
        LaunchError: numbers that do not fit together; more ranks than GPUs.
    """

    nproc: int = 1
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str | None = None
    master_port: int | None = None

    def __post_init__(self) -> None:
        if self.nproc < 1 or self.nnodes < 1:
            raise LaunchError(
                f"--nproc {self.nproc} --nnodes {self.nnodes}: both must be at least 1"
            )
        if not 0 <= self.node_rank < self.nnodes:
            raise LaunchError(
                f"--node-rank {self.node_rank} with --nnodes {self.nnodes}: it counts the machines "
                f"from 0 to {self.nnodes - 1}"
            )
        if self.nnodes > 1 and self.master_addr is None:
            raise LaunchError(
                f"--nnodes {self.nnodes} needs --master-addr: the address of the machine with "
                "--node-rank 0, the same on every machine"
            )

    @property
    def world_size(self) -> int:
        """Ranks on all machines."""
        return self.nproc * self.nnodes

    def check_devices(self) -> None:
        """Compare with this machine's GPUs.

        Raises:
            LaunchError: more ranks than GPUs.
        """
        import torch

        if not torch.cuda.is_available():
            return
        count = torch.cuda.device_count()
        if self.nproc > count:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            seen = f" (CUDA_VISIBLE_DEVICES={visible})" if visible is not None else ""
            raise LaunchError(
                f"--nproc {self.nproc}, but this machine has {count} GPU(s){seen}: a GPU serves "
                f"one process. Set --nproc {count}, or CUDA_VISIBLE_DEVICES= to train on the CPU."
            )

    def torchrun_words(self) -> list[str]:
        """Its command line, up to the program."""
        address, port = self.master_addr, self.master_port
        if address is None:
            address, port = "127.0.0.1", port or free_port()
        return [
            f"--nnodes={self.nnodes}", f"--node-rank={self.node_rank}",
            f"--nproc-per-node={self.nproc}", f"--master-addr={address}",
            f"--master-port={port or 29500}", "--max-restarts=0", "--monitor-interval=0.1",
        ]  # fmt: skip


def free_port() -> int:
    """A TCP port of this machine that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def threads_per_rank(nproc: int) -> int:
    """CPU threads of each rank so that all together use the cores once."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // nproc)


def launch(plan: Plan, module: str, words: Sequence[str]) -> int:
    """Run ``python -m module words...`` in plan.nproc ranks; returns the exit code of the run.

    0: all ended well. 143, 130: they saved and left on SIGTERM, Ctrl-C. Else the code of the rank
    that failed first (128 + n where signal n killed it, 1 where it hung).

    Raises:
        LaunchError: see Plan.
    """
    plan.check_devices()
    threads = os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(plan.nproc)))
    on = f" on machine {plan.node_rank} of {plan.nnodes}" if plan.nnodes > 1 else ""
    _say(f"starting {plan.nproc} process(es){on}, OMP_NUM_THREADS={threads} each")
    with tempfile.TemporaryDirectory(prefix="xtuner_lite_launch_") as temporary:
        folder = Path(temporary)
        os.environ[LAUNCH_DIR], os.environ[LAUNCHER_PID] = temporary, str(os.getpid())
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # C++ stacks of each lost connection
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        agent = TorchrunAgent([*plan.torchrun_words(), "-m", module, *words])
        try:
            return Supervisor(folder, plan.nproc, agent).run()
        finally:
            del os.environ[LAUNCH_DIR], os.environ[LAUNCHER_PID]


class TorchrunAgent:
    """torch.distributed.run in a thread of this process."""

    def __init__(self, words: list[str]) -> None:
        import logging

        # Its own account of a failure follows ours, and is longer.
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
        self._words = words
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="torchrun", daemon=True)

    def start(self) -> None:
        """Start the ranks."""
        self._thread.start()

    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._thread.is_alive()

    def exit_codes(self) -> dict[int, int]:
        """Rank -> exit code (-n: by signal n) of the ranks that failed; read when it has ended."""
        failures = getattr(self.error, "failures", {})
        first = sorted(failures.values(), key=lambda failure: failure.timestamp)
        ranks = {id(failure): rank for rank, failure in failures.items()}
        return {ranks[id(failure)]: failure.exitcode for failure in first}

    def _run(self) -> None:
        from torch.distributed import run as torchrun

        try:
            torchrun.run(torchrun.parse_args(self._words))
        except BaseException as error:
            self.error = error


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
                _say(f"{name} again: the processes are killed")
                self._kill_in(0.0)
                return
            _say(f"{name}: the processes finish their step, save and end; once more kills them")
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
                _say(f"the processes could not be started: {self._agent.error}")
                return 1
            return 0
        rank, code = failed[0] if failed else (failure["rank"], 1)
        how = how_it_ended(code)
        if failure is not None:
            rank = failure["rank"]
            code = failure["exit_code"] if failure["kind"] in ("error", "died") else 1
            how = _HOW.get(failure["kind"]) or how_it_ended(code)
        _say(f"rank {rank} {how}; every process of this machine has ended")
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


# --- inside a rank


def enter_rank(environ: Mapping[str, str] | None = None) -> bool:
    """What a rank that ``launch`` started does first; False where none did.

    It tells its pid, ends with the launcher, and only the first rank of a machine prints to stdout
    (every rank to stderr).
    """
    environ = os.environ if environ is None else environ
    if LAUNCH_DIR not in environ:
        return False
    from xtuner_lite.engine.faults import die_with_parent

    folder = Path(environ[LAUNCH_DIR])
    if os.getppid() != int(environ[LAUNCHER_PID]):
        if Path(environ[LAUNCH_DIR]).exists():
            return False  # a rank's own child
        raise SystemExit(1)  # the launcher ended before we could ask to end with it
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training begins: no traceback
    rank = environ["RANK"]
    (folder / f"rank_{rank}.tmp").write_text(json.dumps({"pid": os.getpid()}))
    (folder / f"rank_{rank}.tmp").rename(folder / f"rank_{rank}.json")
    if environ["LOCAL_RANK"] != "0":
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return True


def run_rank(function: Callable[[], int]) -> int:
    """``function``'s exit code; 0, and a note for the launcher, where it left on a signal."""
    try:
        return function()
    except SystemExit as stop:
        number = getattr(stop, "signal_number", None)
        if number is None:
            raise
        path = Path(os.environ[LAUNCH_DIR]) / f"interrupted_{os.environ['RANK']}.json"
        path.with_suffix(".tmp").write_text(json.dumps({"signal": int(number)}))
        path.with_suffix(".tmp").rename(path)
        return 0


# --- processes


def _has_ended(pid: int) -> tuple[bool, int | None]:
    """(whether a child ended, its exit code or None where another took it), without reaping it."""
    if not hasattr(os, "waitid"):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True, None
        return False, None
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


def _say(text: str) -> None:
    print(f"xtuner-lite: {text}", file=sys.stderr, flush=True)
