"""Locks between processes. The kernel releases a lock when its process ends, even if the process is killed."""

from __future__ import annotations

import fcntl


def lock(handle: int, wait: bool = False, shared: bool = False) -> bool:
    """Lock an open file or folder for this process alone.

    Args:
        wait: wait until no other process has the lock.
        shared: let other processes that ask for a shared lock have one as well.

    Returns:
        True if the lock was taken; False if another process has it, or if the file system has no locks.
    """
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True
