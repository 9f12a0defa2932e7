"""Locks between processes. A lock ends with its process, however the process ends."""

from __future__ import annotations

import fcntl


def lock(handle: int, wait: bool = False) -> bool:
    """Lock an open file or folder for this process alone.

    Args:
        wait: wait until another process gives the lock back.

    Returns:
        False where another process has the lock, or the file system has no locks.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True
