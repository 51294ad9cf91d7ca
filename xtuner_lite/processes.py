"""Questions about processes that more than one part asks."""

from __future__ import annotations

import os


def is_running(pid: int) -> bool:
    """Whether a process of this machine has that number; one of another user counts too."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
