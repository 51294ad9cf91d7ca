"""What ranks tell each other, and how a process learns its rank."""

import os
import socket
import subprocess
import sys

import pytest

from tests.ranks import run_ranks
from xtuner_lite.engine.distributed import (
    PeerError,
    Ranks,
    _first_slurm_host,
    init_distributed,
    seed_of_rank,
)


def talk(folder):
    ranks = init_distributed("pytorch")
    rank, order = ranks.rank, []
    with ranks.local_main_first():
        order.append(rank == 0 or (folder / "cache").exists())
        (folder / "cache").touch()
    result = {
        "sum": ranks.sum(rank + 0.5),
        "any": (ranks.any(rank == 1), ranks.any(False)),
        "sum_each": ranks.sum_each({"both": 1, f"only_{rank}": 2.0}),
        "gather": ranks.gather(f"r{rank}"),
        "broadcast": ranks.broadcast(rank if rank else "from 0"),
        "on_main": ranks.on_main(lambda: 40 + rank),
        "main_was_first": order,
    }
    for failing in (0, 1):
        try:
            with ranks.together():
                if rank == failing:
                    raise KeyError("lost")
        except (KeyError, PeerError) as error:
            result[f"failing_{failing}"] = f"{type(error).__name__}: {error}"
    return result


def test_sums_objects_and_failures_of_two_ranks(tmp_path):
    first, second = run_ranks(talk, tmp_path)
    for result in (first, second):
        assert result["sum"] == 2.0
        assert result["any"] == (True, False)
        assert result["sum_each"] == {"both": 2, "only_0": 2.0, "only_1": 2.0}
        assert result["gather"] == ["r0", "r1"]
        assert result["broadcast"] == "from 0"
        assert result["on_main"] == 40
        assert result["main_was_first"] == [True]
    assert first["failing_0"] == "KeyError: 'lost'"
    assert second["failing_0"] == "PeerError: rank 0 failed: KeyError: 'lost'"
    assert first["failing_1"] == "PeerError: rank 1 failed: KeyError: 'lost'"


def test_one_process_needs_nobody():
    ranks = Ranks()
    assert ranks.sum(2) == 2.0
    assert ranks.gather("x") == ["x"]
    assert ranks.on_main(lambda: 7) == 7
    with pytest.raises(KeyError), ranks.together():
        raise KeyError("own error, unchanged")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node1", "node1"), ("a1,b2", "a1"), ("n[03-05,9],x1", "n03"), ("x[7],y", "x7")],
)
def test_the_first_host_of_a_slurm_list(nodes, first):
    assert _first_slurm_host(nodes) == first


def test_launchers_that_do_not_fit_the_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("PMI_RANK", raising=False)
    with pytest.raises(ValueError, match="launcher='torch' is not known; allowed: none, pytorch"):
        init_distributed("torch")
    with pytest.raises(RuntimeError, match="RANK is not set; start the command through torchrun"):
        init_distributed("pytorch")
    with pytest.raises(RuntimeError, match="SLURM_PROCID is not set; .* through srun"):
        init_distributed("slurm")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    before = {k: os.environ.get(k) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    try:
        with pytest.raises(RuntimeError, match="MASTER_ADDR is not set"):
            init_distributed("mpi")
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def test_ranks_draw_from_different_seeds():
    seeds = [seed_of_rank(5, rank) for rank in range(64)]
    assert seeds[0] == 5
    assert len(set(seeds)) == 64


MEET = """
from xtuner_lite.engine.distributed import init_distributed
init_distributed("pytorch", timeout_s=1)
"""


@pytest.mark.parametrize("listens", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_first_process_that_does_not_answer(listens):
    with socket.socket() as first:
        first.bind(("127.0.0.1", 0))
        port = first.getsockname()[1]
        if listens:  # the machine takes the connection, and nobody reads it: a stopped process
            first.listen()
        else:
            first.close()
        variables = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1")
        environment = {**os.environ, **variables, "MASTER_PORT": str(port)}
        done = subprocess.run(
            [sys.executable, "-c", MEET],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    ours = f"did not come together at 127.0.0.1:{port} within 1 s"
    torchs = f"timed out after 1000ms while trying to connect to (127.0.0.1, {port})"
    assert ours in done.stderr or (not listens and torchs in done.stderr)
