"""What a rank does that ``xtuner_lite.cli._launch`` started."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

LAUNCH_DIR = "XTUNER_LITE_LAUNCH_DIR"
LAUNCHER_PID = "XTUNER_LITE_LAUNCHER_PID"


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
