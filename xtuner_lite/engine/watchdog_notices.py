"""The folder in which the launcher and the ranks of a machine leave word for each other.

It exists where ``--nproc`` started the ranks; its files are told in xtuner_lite.cli._launch.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from xtuner_lite.engine.faults import FAILURE_FILE, LAUNCH_DIR, Failure, write_once
from xtuner_lite.engine.watchdog_line import Line


class Notices:
    """What the launcher knows and the store does not: how a process of this machine ended.

    Args:
        rank: of this process.
        host: name of this machine in messages.
    """

    def __init__(self, rank: int, host: str) -> None:
        folder = os.environ.get(LAUNCH_DIR)
        self._folder = Path(folder) if folder else None
        self._rank, self._host = rank, host
        self._noticed: dict[int, int] = {}  # rank that ended with code 0 -> exchanges until then

    def has(self, rank: int) -> bool:
        """Whether that rank was started on this machine. Hosts may have equal names."""
        return self._folder is not None and (self._folder / f"rank_{rank}.json").exists()

    def write(self, failure: Failure) -> None:
        """Tell the launcher what the ranks agreed on; the first one counts."""
        if self._folder is not None:
            write_once(self._folder / FAILURE_FILE, failure.to_json())

    def read(self, line: Line) -> Failure | None:
        """A rank that the launcher saw end before it had finished.

        Args:
            line: knows which ranks have finished, on rank 0.
        """
        if self._folder is None:
            return None
        for path in sorted(self._folder.glob("died_*.json")):
            try:
                notice = json.loads(path.read_text())
            except (OSError, ValueError):
                continue
            if (failure := self._judge(notice, line)) is not None:
                return failure
        return None

    def _judge(self, notice: dict, line: Line) -> Failure | None:
        rank, code = notice["rank"], notice["exit_code"] or 0  # None: not known yet
        seen = line.seen.get(rank)
        if rank == self._rank or (seen is not None and seen.is_done):
            return None
        without_store = rank == 0 and line.error is not None
        if code == 0 and not without_store:
            # Only rank 0 knows, after another exchange, whether that rank had finished.
            first = self._noticed.setdefault(rank, line.num_exchanges)
            if self._rank != 0 or line.num_exchanges < first + 2:
                return None
        where = seen.beat.where if seen is not None and seen.beat is not None else ""
        return Failure("died", rank, self._host, notice["pid"], where, exit_code=code)
