"""The watchdog: rules of blame, what an error means, and real processes that fail.

A training with every way to fail is in tests/reliability/test_rank_failures.py.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from tests.reliability.forked_ranks import running_in
from xtuner_lite.engine import faults
from xtuner_lite.engine.distributed import PeerError
from xtuner_lite.engine.faults import Failure, exit_code_of, is_secondary, stack_of
from xtuner_lite.engine.network import interface_towards
from xtuner_lite.engine.watchdog import Watchdog
from xtuner_lite.engine.watchdog_blame import (
    PATIENCE_S,
    SILENT_S,
    Beat,
    Seen,
    find_lost,
    find_silent,
    find_stalled,
)

ROOT = Path(__file__).parents[2]
NOW = 1000.0
TIMEOUT_S = 10.0


def seen(rank: int, *, silent: float = 0.2, **beat: object) -> Seen:
    """A rank as the judge sees it: not silent, and over its limit, unless said otherwise."""
    values = dict(what="sums", step=7, marks=50, age_s=11.0, limit_s=TIMEOUT_S, waiting=True)
    return Seen(NOW - silent, Beat(rank, f"host{rank}", 100 + rank, **{**values, **beat}))


def stalled(*entries: Seen) -> Failure | None:
    return find_stalled({entry.beat.rank: entry for entry in entries}, NOW, TIMEOUT_S)


# --- which rank is at fault


def test_a_rank_that_gets_further_covers_those_that_wait():
    assert stalled(seen(0), seen(1, age_s=0.1)) is None
    assert stalled(seen(0), seen(1, age_s=500.0, limit_s=7200.0)) is None  # writes a checkpoint
    assert stalled(seen(0), seen(1, age_s=500.0, limit_s=math.inf)) is None


def test_the_rank_that_waits_for_nobody_is_at_fault():
    # It is further than the others by marks: hooks of one rank make more of them.
    failure = stalled(seen(0), seen(1, waiting=False, marks=60, stack="in_my_hook\n"), seen(2))
    assert (failure.kind, failure.rank, failure.host, failure.pid) == ("hang", 1, "host1", 101)
    assert "in_my_hook" in failure.text
    assert "env_cfg.dist_cfg.timeout" in failure.text
    assert failure.others == [
        "rank 0 on host0: step 7, sums, for 11 s (it waits for other ranks)",
        "rank 2 on host2: step 7, sums, for 11 s (it waits for other ranks)",
    ]


def test_where_all_wait_the_one_behind_is_at_fault():
    assert stalled(seen(0), seen(1, step=6, marks=70), seen(2)).rank == 1
    assert stalled(seen(0), seen(1), seen(2, marks=49)).rank == 2


def test_one_that_finished_while_others_wait_is_at_fault():
    failure = stalled(seen(0), seen(1, state="done", step=5))
    assert (failure.kind, failure.rank) == ("hang", 1)
    assert "has finished" in failure.text


def test_a_silent_rank_is_at_fault_before_all_others():
    failure = stalled(seen(0), seen(1, waiting=False), seen(2, silent=8.0))
    assert (failure.kind, failure.rank) == ("vanished", 2)
    assert stalled(seen(0, age_s=0.0), seen(1, silent=9.9)) is None  # another still works
    failure = stalled(seen(0, age_s=0.0), seen(1, silent=10.1, limit_s=math.inf))
    assert (failure.kind, failure.rank) == ("vanished", 1)
    assert "10 s ago" in failure.text


def test_a_rank_that_never_spoke():
    failure = find_stalled({0: seen(0), 1: Seen(NOW - 10.5)}, NOW, TIMEOUT_S)
    assert (failure.kind, failure.rank) == ("vanished", 1)
    assert "never gave a sign of life" in failure.text


def test_finished_ranks_are_not_judged():
    assert stalled(seen(0, state="done", silent=99.0), seen(1, state="done")) is None
    assert find_silent({0: seen(0, state="done", silent=99.0)}, NOW, 1.0) is None


def test_ranks_that_lost_their_peers_wait_for_the_silent_one():
    entries = {0: seen(0, state="lost", stack="gloo: closed\n"), 1: seen(1, silent=SILENT_S - 1)}
    assert find_lost(entries, NOW, lost_s=1.0) is None
    entries[1] = seen(1, silent=SILENT_S + 0.1)
    assert (find_lost(entries, NOW, 1.0).kind, find_lost(entries, NOW, 1.0).rank) == ("vanished", 1)
    entries[1] = seen(1)
    failure = find_lost(entries, NOW, PATIENCE_S)
    assert (failure.kind, failure.rank, failure.text) == ("communication", 0, "gloo: closed\n")


def test_long_lists_are_cut():
    failure = stalled(seen(0, waiting=False), *(seen(rank) for rank in range(1, 20)))
    assert len(failure.others) == 9
    assert failure.others[-1] == "... and 11 more"


# --- words


def test_a_failure_survives_the_store():
    failure = Failure("died", 3, "b", 42, "step 2, update", exit_code=-9, world_size=4)
    assert Failure.from_json(failure.to_json()) == failure
    assert failure.headline() == (
        "rank 3 of 4 (host b, pid 42) was killed by SIGKILL, last heard of at step 2, update"
    )


@pytest.mark.parametrize(
    ("error", "secondary"),
    [
        (PeerError("rank 1 failed: ValueError: x"), True),
        (torch.distributed.DistNetworkError("x"), True),
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] ..."), True),
        (RuntimeError("Connection closed by peer [127.0.0.1]:1234"), True),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. "), True),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), False),
        (ConnectionResetError("the metrics server: Connection reset by peer"), False),
        (ValueError("gloo/transport"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_errors_that_only_tell_of_another_rank(error, secondary):
    assert is_secondary(error) is secondary


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError(), 1), (SystemExit(3), 3), (SystemExit("text"), 1), (SystemExit(), 0),
     (KeyboardInterrupt(), 130)],
)  # fmt: skip
def test_exit_codes(error, code):
    assert exit_code_of(error) == code


def test_stack_of_a_thread_that_sleeps():
    def wait_here(event):
        event.wait()

    event = threading.Event()
    thread = threading.Thread(target=wait_here, args=(event,))
    thread.start()
    text, waiting = stack_of(thread.ident)
    event.set()
    thread.join()
    assert "wait_here" in text
    assert not waiting


def test_a_wait_in_torch_distributed_is_recognised():
    code = compile(
        "import sys\ndef all_reduce():\n    return sys._getframe()\n",
        "/x/torch/distributed/distributed_c10d.py", "exec",
    )  # fmt: skip
    names: dict = {}
    exec(code, names)
    assert faults._is_communication(names["all_reduce"]())
    assert not faults._is_communication(sys._getframe())


def test_write_once(tmp_path):
    assert faults.write_once(tmp_path / "a", "first")
    assert not faults.write_once(tmp_path / "a", "second")
    assert (tmp_path / "a").read_text() == "first"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_kill_children_reaches_grandchildren():
    program = (
        "import os, subprocess, time\n"
        "from xtuner_lite.engine.faults import kill_children\n"
        "child = subprocess.Popen(['sh', '-c', 'sleep 60 & echo $!; wait'],"
        " stdout=subprocess.PIPE, text=True)\n"
        "print(child.stdout.readline(), flush=True)\n"
        "kill_children()\n"
        "child.wait()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60,
        start_new_session=True,
    )  # fmt: skip
    grandchild = int(done.stdout.split()[0])
    time.sleep(0.1)
    assert done.returncode == 0, done.stderr
    assert faults.process_state(grandchild) in (
        f"The process {grandchild} is gone.",
        f"The process {grandchild} has ended.",
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux")
def test_interface_towards_an_address():
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no.such.host.invalid") is None


# --- one process


def test_one_process_is_not_watched():
    watchdog = Watchdog(rank=0, world_size=1)
    watchdog.start()
    watchdog.mark("reading", 1)
    with watchdog.slow("saving", 5.0):
        pass
    watchdog.failed(ValueError("x"))
    watchdog.close()
    assert not any(thread.name.startswith("watchdog") for thread in threading.enumerate())


def test_marks_and_slow_phases():
    watchdog = Watchdog(rank=0, world_size=2, store=HashStore(), timeout_s=5.0)
    watchdog.mark("reading", 4)
    with watchdog.slow("saving", 60.0):
        beat = watchdog._beat()
        assert (beat.where, beat.limit_s, beat.marks) == ("step 4, saving", 60.0, 2)
    beat = watchdog._beat()
    assert (beat.where, beat.limit_s) == ("step 4, after saving", 5.0)


def test_a_machine_that_slept_is_forgiven():
    watchdog = Watchdog(rank=0, world_size=2, store=HashStore(), timeout_s=5.0)
    watchdog._tick = time.monotonic() - 100.0  # our own thread did not run for 100 s
    watchdog._mark = ("reading", 4, 1, time.monotonic() - 101.0)
    watchdog._line.seen = {1: Seen(time.monotonic() - 101.0, seen(1).beat)}
    watchdog._forgive_a_pause()
    assert watchdog._beat().age_s < 2.0
    assert watchdog._line.seen[1].silent_s(time.monotonic()) < 2.0


# --- several processes


def run_program(name: str, timeout_s: float = 400) -> dict:
    """A run of tests/engine/watchdog_runs.py: name -> what came out."""
    done = subprocess.run(
        [sys.executable, "tests/engine/watchdog_runs.py", name], cwd=ROOT, capture_output=True,
        text=True, timeout=timeout_s,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def runs() -> dict:
    return run_program("all")


def test_well_ended_runs_end_at_once(runs):
    assert runs["well"]["code"] == 0
    assert runs["well"]["output"].strip() == ""
    assert runs["uneven end"]["code"] == 0  # rank 0 waits for the others' last words


def test_slow_phase_covers_the_others(runs):
    assert runs["slow"]["code"] == 0


def test_three_ranks_one_raises(runs):
    run = runs["raise of 3"]
    assert run["code"] == 1
    assert run["output"].count("rank 2 of 3") == 1
    assert run["output"].count("Traceback") == 1
    assert "failed first, at step 3, reading (ValueError: injected)" in run["output"]
    assert run["left_behind"] == []


def test_a_peers_error_waits_for_the_cause(runs):
    run = runs["peer error"]
    assert run["code"] == 1
    assert "rank 1 of 2" in run["output"]
    assert "the cause" in run["output"]
    assert "rank 0" not in run["output"].replace("rank 0 on", "")


def test_a_hang_under_another_launcher(runs):
    """No launch folder, no launcher that kills: the ranks end by themselves."""
    run = runs["hang without launcher"]
    assert run["codes"] == [1, 1]
    assert run["seconds"] < 4.0 + 5.0
    assert "rank 1 of 2" in run["output"]
    assert "did not arrive, at step 3, reading" in run["output"]
    assert "hang_here" in run["output"]
    assert "failure.txt" in run["files"]


def test_a_killed_rank_under_another_launcher(runs):
    run = runs["kill without launcher"]
    assert run["codes"] == [1, -9]
    assert "rank 1 of 2" in run["output"]
    assert "stopped answering" in run["output"]


def test_the_process_that_holds_the_store_is_killed(runs):
    run = runs["kill store without launcher"]
    assert run["codes"] == [-9, 1]
    assert "rank 0 of 2" in run["output"]
    assert "does not answer any more" in run["output"]


def test_leaving_in_the_middle(runs):
    run = runs["leave without launcher"]
    assert run["codes"] == [1, 0]
    assert "rank 1 of 2" in run["output"]
    assert "before the run had finished" in run["output"]


def test_helpers_find_processes():
    assert os.getpid() in running_in({os.getsid(0)})
