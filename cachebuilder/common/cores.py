"""The processors that this process may use."""

from __future__ import annotations

import os


def available_cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0))
