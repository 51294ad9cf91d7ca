"""A checkpoint that is written while training goes on: one thread per rank, no talk between them.

The ranks tell each other through small files in the folder that is being written. The folder gets
its name only when every rank's part is there, as in a save that waits.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from xtuner_lite.engine.checkpoint import (
    CheckpointError,
    begin_checkpoint,
    check_shared,
    finish_checkpoint,
    told_where_full,
)
from xtuner_lite.engine.distributed import Ranks

_POLL_S = 0.05


class AsyncWriter:
    """Writes one checkpoint in the background.

    Args:
        target: the checkpoint's folder.
        write: puts this rank's files into a folder; must read nothing that training changes.
        ranks: the processes of the run; all make their AsyncWriter together.
    """

    def __init__(self, target: Path, write: Callable[[Path], None], ranks: Ranks) -> None:
        self.target, self._write, self._ranks = target, write, ranks
        self._error: BaseException | None = None
        self._aside = Path(ranks.on_main(lambda: str(begin_checkpoint(target))))
        with ranks.together():
            check_shared(self._aside)
        self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until the checkpoint is whole; every rank calls it.

        Raises:
            CheckpointError: no space, or another reason why it could not be written.
            PeerError: another rank could not write its part.
        """
        self._thread.join()
        self._ranks.agree(self._error)

    def _run(self) -> None:
        try:
            with told_where_full(self.target):
                self._write(self._aside)
                self._tell("done")
                if self._ranks.is_main:
                    self._wait_for_others()
                    for mark in self._aside.glob(".rank_*"):
                        mark.unlink()
                    finish_checkpoint(self._aside, self.target)
        except BaseException as error:
            self._error = error
            self._tell_failure()
            if self._ranks.is_main:
                shutil.rmtree(self._aside, ignore_errors=True)

    def _tell(self, what: str) -> None:
        (self._aside / f".rank_{self._ranks.rank}.{what}").touch()

    def _tell_failure(self) -> None:
        try:
            self._tell("failed")
        except OSError as error:  # the folder is gone, or the disk is full: an empty file may fail
            self._error.add_note(str(error)) if hasattr(self._error, "add_note") else None

    def _wait_for_others(self) -> None:
        while len(list(self._aside.glob(".rank_*.done"))) < self._ranks.world_size:
            if failed := list(self._aside.glob(".rank_*.failed")):
                raise CheckpointError(
                    f"{self.target} was not written: {failed[0].stem[1:].replace('_', ' ')} could "
                    "not write its part"
                )
            time.sleep(_POLL_S)
