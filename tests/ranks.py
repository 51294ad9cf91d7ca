"""Several ranks inside a test, each a process forked from a server that has all imported."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

_PRELOAD = ["tests.ranks_imports"]


def free_port() -> int:
    """A TCP port that is free on this machine now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(function: Callable[..., Any], *args: Any, world_size: int = 2, timeout_s=120) -> list:
    """Run ``function(*args)`` on every rank with torchrun's variables set; their results, by rank.

    Args:
        function: defined at the top of a module; its result must pickle.

    Raises:
        AssertionError: a rank raised (its traceback is in the message) or did not end in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    port = free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_one_rank, args=(rank, world_size, port, theirs, function, args), daemon=False
        )
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    results, errors = [], []
    try:
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(timeout_s):
                errors.append(f"rank {rank} did not end within {timeout_s} s")
                continue
            try:
                ok, value = pipe.recv()
            except EOFError:
                ok, value = False, "the process died"
            (results if ok else errors).append(value if ok else f"rank {rank}: {value}")
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
    assert not errors, "\n".join(errors)
    return results


def _one_rank(rank: int, world_size: int, port: int, pipe, function, args) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    import torch

    torch.set_num_threads(1)
    try:
        pipe.send((True, function(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
