"""Write files whole or not at all, and make folders, at paths that the user named."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from cachebuilder.common.folders import Folder
from cachebuilder.errors import CacheBuilderError


def write_atomically(path: Path, data: bytes, error: type[CacheBuilderError], mode: int = 0o644) -> None:
    """Write ``data`` to ``path`` whole or not at all, replacing the file that was there.

    It is safe for several processes to write at once, and to be killed at any moment. A file that has these bytes and
    this mode already is left alone.

    Args:
        error: the kind of error to raise.

    Raises:
        CacheBuilderError: of the kind ``error``: the file or its folder cannot be written.
    """
    with writing(path, error), Folder.make_at(path.parent, exact=False) as folder:
        folder.write(path.name, data, mode)


@contextlib.contextmanager
def writing(path: Path, error: type[CacheBuilderError], hint: str | None = None) -> Iterator[None]:
    """Turn an `OSError` inside the context into an error of the kind ``error`` that names ``path``."""
    try:
        yield
    except OSError as reason:
        raise error(f"{path}: cannot be written: {reason.strerror}", hint=hint) from reason


def is_full(error: OSError) -> bool:
    """Whether a file could not be written because the disk is full, or the user's share of it."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def make_folders(path: Path) -> None:
    """Make a folder and its missing parents, each with mode 0755 regardless of the umask.

    Raises:
        OSError: one of them cannot be made.
    """
    Folder.make_at(path).close()
