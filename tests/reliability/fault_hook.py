"""A hook that lets one rank fail, for tests of runs of several processes."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from typing import Any

import torch
from mmengine.hooks import Hook

from tests.reliability.forked_ranks import note_fault
from tests.toy import ToyData


def hang_here() -> None:
    """Hangs in Python, where a stack shows this name."""
    while True:
        time.sleep(0.05)


def fail(kind: str) -> None:
    """What goes wrong.

    Args:
        kind: 'none', 'raise', 'sys_exit', 'os_exit', 'exit_0', 'kill', 'sleep', 'spin', 'stop',
            'lock' (hangs in C and holds Python's lock), 'collective' (one too many).
    """
    if kind == "none":
        return
    note_fault()
    if kind == "raise":
        raise ValueError("this error was injected")
    if kind == "sys_exit":
        sys.exit(3)
    if kind in ("os_exit", "exit_0"):
        os._exit(3 if kind == "os_exit" else 0)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "sleep":
        hang_here()
    if kind == "spin":
        while True:
            pass
    if kind == "lock":
        ctypes.PyDLL(None).sleep(100_000)
    if kind == "collective":
        torch.distributed.barrier()
    raise AssertionError(f"{kind} went on")


class Fault(Hook):
    """Fails as ``kind`` says, on one rank, at one stage of one step.

    Args:
        kind: see ``fail``.
        rank: which rank.
        step: 1-based optimizer step.
        stage: a stage of the training loop, e.g. 'before_train_iter'.
        seconds_per_step: every rank takes at least this long for a step.
    """

    def __init__(
        self,
        kind: str = "none",
        rank: int = 0,
        step: int = 3,
        stage: str = "before_train_iter",
        seconds_per_step: float = 0.0,
    ) -> None:
        self.kind, self.rank, self.step = kind, rank, step
        self.seconds_per_step = seconds_per_step
        self._stage = stage

    def before_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        time.sleep(self.seconds_per_step)
        self._at("before_train_iter", runner)

    def before_optimizer_step(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        self._at("before_optimizer_step", runner)

    def after_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        self._at("after_train_iter", runner)

    def after_run(self, runner: Any) -> None:
        if self._stage == "after_run" and runner.strategy.rank == self.rank:
            fail(self.kind)

    def _at(self, stage: str, runner: Any) -> None:
        here = (stage, runner.strategy.rank, runner.train_loop.iter + 1)
        if here == (self._stage, self.rank, self.step):
            fail(self.kind)


class FaultyWorkerData(ToyData):
    """ToyData of which one sample ends, or hangs, the process that reads it.

    Args:
        kind: see ``fail``.
        index: of that sample.
    """

    def __init__(self, size: int = 400, kind: str = "none", index: int = -1) -> None:
        super().__init__(size)
        self.kind, self.index = kind, index

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == self.index:
            fail(self.kind)
        return super().__getitem__(index)
