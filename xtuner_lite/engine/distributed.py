"""Ranks, devices and randomness.

``Ranks`` is all that the rest of the project uses to talk between processes: sums, gathered
objects, one for all. In a run of one process each of its methods returns at once.
"""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from xtuner_lite.engine.network import set_gloo_interface

Result = TypeVar("Result")

LAUNCHERS = ("none", "pytorch", "slurm", "mpi")

#: Seconds without progress after which a run of several processes gives up; see engine.watchdog.
DEFAULT_TIMEOUT_S = 300.0
#: The same for phases that may take long: loading, preparing data, writing a checkpoint.
DEFAULT_SLOW_TIMEOUT_S = 7200.0
#: Beyond its time-out torch gets this long to tell by itself why the processes did not meet.
_MEETING_GRACE_S = 1.0

#: Launcher -> names of the variables that hold (rank, world size, local rank).
_VARIABLES = {
    "pytorch": (("RANK",), ("WORLD_SIZE",), ("LOCAL_RANK",)),
    "slurm": (("SLURM_PROCID",), ("SLURM_NTASKS",), ("SLURM_LOCALID",)),
    "mpi": (
        ("OMPI_COMM_WORLD_RANK", "PMI_RANK"),
        ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"),
    ),
}


class PeerError(RuntimeError):
    """Another rank failed in a phase that all ranks do together; it says which one and why."""


class Ranks:
    """The processes of a run, and what they tell each other.

    Args:
        rank: number of this process.
        world_size: how many there are.
        local_rank: number of this process on its machine; it chooses the GPU.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank

    @property
    def is_main(self) -> bool:
        """True on the rank that writes logs and files."""
        return self.rank == 0

    def sum(self, value: float) -> float:
        """``value`` summed over all ranks, in float64; the same number on each."""
        if self.world_size == 1:
            return float(value)
        total = torch.tensor(float(value), dtype=torch.float64)
        dist.all_reduce(total)
        return total.item()

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on at least one rank."""
        return bool(flag) if self.world_size == 1 else self.sum(float(bool(flag))) > 0

    def sum_each(self, values: dict[str, float]) -> dict[str, float]:
        """Sum per name over all ranks; a name that a rank lacks counts 0 there."""
        if self.world_size == 1:
            return values
        totals: dict[str, float] = {}
        for part in self.gather(values):
            for name, value in part.items():
                totals[name] = totals.get(name, 0.0) + value
        return totals

    def gather(self, value: Result) -> list[Result]:
        """``value`` of every rank, by rank; on each rank. Small plain objects only."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Result) -> Result:
        """The main rank's ``value`` on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def set_timeout(self, timeout_s: float) -> None:
        """Seconds after which a communication that does not end is an error, from here on."""
        if self.world_size > 1:
            _set_pg_timeout(timedelta(seconds=timeout_s))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.sum(0.0)

    def agree(self, error: BaseException | None) -> None:
        """End a phase that all ranks do together: if one failed, all fail, and none waits for it.

        Raises:
            BaseException: this rank's own ``error``.
            PeerError: another rank's, told in its words.
        """
        texts = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, text in enumerate(texts):
            if text is not None:
                raise PeerError(f"rank {rank} failed: {text}")

    @contextmanager
    def together(self) -> Iterator[None]:
        """``agree`` around a block without communication inside: it fails on all ranks or none."""
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.agree(error)

    def on_main(self, function: Callable[[], Result]) -> Result:
        """Run ``function`` on the main rank only; every rank gets its result, or fails with it."""
        result: Any = None
        with self.together():
            if self.is_main:
                result = function()
        return self.broadcast(result)

    @contextmanager
    def local_main_first(self) -> Iterator[None]:
        """The first rank of each machine does the block (and fills caches), then the others do."""
        if self.local_rank != 0:
            self.agree(None)
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.agree(error)
        if self.local_rank == 0:
            self.agree(None)


def init_distributed(
    launcher: str = "none",
    *,
    backend: str | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Ranks:
    """Join the other processes of this run, as its launcher's variables say.

    Args:
        launcher: 'pytorch' (torchrun, ``--nproc``), 'slurm', 'mpi', or 'none': one process, except
            where torchrun started this one.
        backend: of torch.distributed; None takes NCCL for GPU tensors and gloo for the rest.
        timeout_s: seconds in which all processes must have come together, and after which a
            communication that does not end is an error (until ``Ranks.set_timeout``).

    Raises:
        ValueError: an unknown launcher.
        RuntimeError: the launcher's variables are missing; fewer GPUs than processes on a machine.
    """
    if launcher not in LAUNCHERS:
        raise ValueError(f"launcher={launcher!r} is not known; allowed: {', '.join(LAUNCHERS)}")
    if launcher == "none":
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return Ranks()
        launcher = "pytorch"
    numbers = [_read_number(launcher, names) for names in _VARIABLES[launcher]]
    rank, world_size, local_rank = numbers
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise RuntimeError(
                f"process {local_rank} of this machine has no GPU: {torch.cuda.device_count()} "
                "are here. Start at most one process per GPU (--nproc)."
            )
        torch.cuda.set_device(local_rank)
    if world_size == 1:
        return Ranks()
    # Libraries (DeepSpeed, accelerate) read these names whatever the launcher was.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    if launcher == "slurm":
        os.environ.setdefault("MASTER_ADDR", _first_slurm_host(os.environ["SLURM_NODELIST"]))
    os.environ.setdefault("MASTER_PORT", "29500")
    if "MASTER_ADDR" not in os.environ:
        raise RuntimeError(
            f"launcher={launcher!r}: MASTER_ADDR is not set; export the address of the first host "
            "(and MASTER_PORT, a free port on it) for every process"
        )
    if not dist.is_initialized():
        set_gloo_interface(os.environ["MASTER_ADDR"])
        if backend is None:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        with meeting_within(timeout_s, rank):
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return Ranks(rank, world_size, local_rank)


@contextmanager
def meeting_within(timeout_s: float, rank: int) -> Iterator[None]:
    """End this process where the block, which connects to the first one, takes longer.

    torch waits for twice its time-out where nobody listens, and for ever where somebody listens and
    does not answer (measured with 2.13).
    """

    def end() -> None:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        print(
            f"xtuner_lite: rank {rank}: the processes did not come together at {address} within "
            f"{timeout_s:g} s. Is the first process running, is its address right and open to "
            "this host? env_cfg.dist_cfg.timeout gives them more time.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    timer = threading.Timer(timeout_s + _MEETING_GRACE_S, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _read_number(launcher: str, names: tuple[str, ...]) -> int:
    for name in names:
        if name in os.environ:
            return int(os.environ[name])
    raise RuntimeError(
        f"launcher={launcher!r}, but {' / '.join(names)} is not set; start the command through "
        f"{ {'pytorch': 'torchrun or --nproc', 'slurm': 'srun', 'mpi': 'mpirun'}[launcher] }"
    )


def _first_slurm_host(node_list: str) -> str:
    """'node[03-05,9],x1' -> 'node03'."""
    head, bracket, rest = node_list.partition("[")
    if not bracket or "," in head:
        return node_list.split(",")[0]
    return head + rest.split("]")[0].split(",")[0].split("-")[0]


def default_device() -> torch.device:
    """The CUDA device of this process where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def draw_seed() -> int:
    """A seed of the system's randomness, in [0, 2**31)."""
    return int.from_bytes(os.urandom(4), "little") % 2**31


def set_randomness(seed: int | None = None, deterministic: bool = False) -> int:
    """Seed Python, NumPy and torch; return the seed used.

    Args:
        seed: None draws one (it is logged and stored, so the run can be repeated).
        deterministic: use only deterministic CUDA kernels; slower. On the CPU a run repeats bit for
            bit at a fixed thread count anyway.
    """
    if seed is None:
        seed = draw_seed()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    return seed


def seed_of_rank(seed: int, rank: int) -> int:
    """A seed for the generators of ``rank``, so that ranks draw different dropout masks."""
    return seed if rank == 0 else int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])


def random_state() -> dict:
    """The states of every generator a run draws from."""
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=True),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def load_random_state(state: dict) -> None:
    """Put the generators back to what ``random_state`` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.as_tensor(state["torch"], dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.as_tensor(state["cuda"], dtype=torch.uint8))
