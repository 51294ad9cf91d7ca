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

import os
import socket
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from xtuner_lite.cli._rank import LAUNCH_DIR, LAUNCHER_PID
from xtuner_lite.cli._supervisor import Supervisor, say


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


def launch(plan: Plan, module: str, words: Sequence[str]) -> NoReturn:
    """Run ``python -m module words...`` in plan.nproc ranks; ends this process with their code.

    0: all ended well. 143, 130: they saved and left on SIGTERM, Ctrl-C. Else the code of the rank
    that failed first (128 + n where signal n killed it, 1 where it hung).

    Raises:
        LaunchError: see Plan.
    """
    plan.check_devices()
    threads = os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(plan.nproc)))
    on = f" on machine {plan.node_rank} of {plan.nnodes}" if plan.nnodes > 1 else ""
    say(f"starting {plan.nproc} process(es){on}, OMP_NUM_THREADS={threads} each")
    with tempfile.TemporaryDirectory(prefix="xtuner_lite_launch_") as temporary:
        folder = Path(temporary)
        os.environ[LAUNCH_DIR], os.environ[LAUNCHER_PID] = temporary, str(os.getpid())
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # C++ stacks of each lost connection
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        agent = TorchrunAgent([*plan.torchrun_words(), "-m", module, *words])
        code = Supervisor(folder, plan.nproc, agent).run()
    # Tidying up torch takes seconds on a busy machine; after a failure they count.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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
