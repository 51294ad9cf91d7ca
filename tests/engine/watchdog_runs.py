"""Small runs of several ranks under a watchdog; prints how they ended, as one JSON object.

A program, started by test_watchdog.py, so that the ranks are forked from a process without threads.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from tests.reliability.fault_hook import hang_here
from tests.reliability.forked_ranks import run_forked
from xtuner_lite.cli._launch import free_port
from xtuner_lite.cli._rank import LAUNCH_DIR
from xtuner_lite.engine.distributed import PeerError
from xtuner_lite.engine.watchdog import Watchdog

TIMEOUT_S = 4.0


def run(
    rank: int,
    world_size: int = 2,
    at_step_3: Callable[[int, Watchdog], None] | None = None,
    after: Callable[[int], None] | None = None,
    log_dir: Path | None = None,
) -> None:
    """Eight steps of one all_reduce each."""
    dist.init_process_group("gloo", timeout=timedelta(hours=1))
    watchdog = Watchdog(rank=rank, world_size=world_size, timeout_s=TIMEOUT_S, log_dir=log_dir)
    watchdog.start()
    try:
        for step in range(1, 9):
            watchdog.mark("reading", step)
            if step == 3 and at_step_3 is not None:
                at_step_3(rank, watchdog)
            watchdog.mark("reducing", step)
            dist.all_reduce(torch.ones(2))
        if after is not None:
            after(rank)
    except Exception as error:
        watchdog.failed(error)
        raise
    watchdog.close()
    dist.destroy_process_group()


def on_rank(which: int, action: Callable[[], None]) -> Callable[..., None]:
    def act(rank: int, watchdog: Watchdog | None = None) -> None:
        if rank == which:
            action()

    return act


def inject() -> None:
    raise ValueError("injected")


def slow_phase(rank: int, watchdog: Watchdog) -> None:
    if rank == 1:
        with watchdog.slow("saving", 60.0):
            time.sleep(TIMEOUT_S + 1.5)


def peer_error(rank: int, watchdog: Watchdog) -> None:
    if rank == 0:
        raise PeerError("rank 1 failed: ValueError: the cause")
    time.sleep(0.5)  # rank 0 tells first, and must not be the one that is named
    raise ValueError("the cause")


def supervised(nproc: int = 2, **options) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        outcome = run_forked(partial(run, world_size=nproc, **options), Path(folder), nproc)
    return {"code": outcome.code, "output": outcome.output, "left_behind": outcome.left_behind}


def alone(**options) -> dict:
    """Two forks without a launcher that watches."""
    os.environ.pop(LAUNCH_DIR, None)
    begin, port, pids = time.monotonic(), free_port(), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for rank in range(2):
            pid = os.fork()
            if pid == 0:
                _be_rank(rank, port, folder, options)
            pids.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        seconds = time.monotonic() - begin
        output = (folder / "output").read_text(errors="replace")
        files = sorted(os.listdir(folder))
    return {"codes": codes, "output": output, "seconds": seconds, "files": files}


def _be_rank(rank: int, port: int, folder: Path, options: dict) -> None:
    import atexit

    code = 1
    try:
        atexit._clear()
        output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 2)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
        )  # fmt: skip
        run(rank, log_dir=folder, **options)
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        os._exit(code)


RUNS: dict[str, Callable[[], dict]] = {
    "well": supervised,
    "uneven end": partial(supervised, after=on_rank(1, partial(time.sleep, 1.5))),
    "slow": partial(supervised, at_step_3=slow_phase),
    "raise of 3": partial(supervised, nproc=3, at_step_3=on_rank(2, inject)),
    "peer error": partial(supervised, at_step_3=peer_error),
    "hang without launcher": partial(alone, at_step_3=on_rank(1, hang_here)),
    "kill without launcher": partial(
        alone, at_step_3=on_rank(1, lambda: os.kill(os.getpid(), signal.SIGKILL))
    ),
    "kill store without launcher": partial(
        alone, at_step_3=on_rank(0, lambda: os.kill(os.getpid(), signal.SIGKILL))
    ),
    "leave without launcher": partial(alone, at_step_3=on_rank(1, partial(sys.exit, 0))),
}


def main() -> None:
    torch.set_num_threads(1)
    names = list(RUNS) if sys.argv[1] == "all" else [sys.argv[1]]
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    with tempfile.TemporaryDirectory() as temporary:
        children = {}
        for number, name in enumerate(names):  # side by side: they mostly wait
            children[name] = Path(temporary, str(number))
            if os.fork() == 0:
                try:
                    children[name].write_text(json.dumps(RUNS[name]()))
                finally:
                    os._exit(0)
        for _ in names:
            os.wait()
        print(json.dumps({name: json.loads(file.read_text()) for name, file in children.items()}))


if __name__ == "__main__":
    main()
