"""Read a file at a path that the user named, or that lies beside one: it may be a FIFO, a device or endless."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def open_regular(path: str | Path) -> int:
    """A file descriptor to read a regular file with. Never waits, and follows links.

    Raises:
        OSError: it cannot be opened, or is a folder, a FIFO, a device or a socket.
    """
    # Without O_NONBLOCK, opening a FIFO waits for a writer.
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        kind = "a folder" if stat.S_ISDIR(mode) else "another kind of file"
        raise OSError(errno.EINVAL, f"wanted a regular file, found {kind}", str(path))
    return handle


def read_named(path: str | Path, most: int) -> bytes:
    """All of a regular file. Raises `OSError`, also if it is another kind of file or has more than ``most`` bytes."""
    with open(open_regular(path), "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"wanted at most {most} bytes, found more", str(path))
    return data
