"""Folders, and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cachebuilder.errors import CacheBuilderError

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def write_new(name: str, data: bytes, mode: int, dir_fd: int | None = None) -> None:
    """Write a file that must not exist yet, with exactly ``mode``, whatever the umask. Follows no link.

    Raises:
        OSError: it exists, or cannot be written.
    """
    handle = os.open(name, _NEW, mode, dir_fd=dir_fd)
    with os.fdopen(handle, "wb") as file:
        os.fchmod(handle, mode)
        file.write(data)


def write_atomically(path: Path, data: bytes, error: type[CacheBuilderError], mode: int = 0o644) -> None:
    """Put ``data`` at ``path`` whole or not at all, and replace what was there. Many writers and a kill are safe.

    A file that has these bytes and this mode already is left alone.

    Args:
        error: the kind to raise.

    Raises:
        CacheBuilderError: of the kind ``error``: the file or its folder cannot be written.
    """
    with contextlib.suppress(OSError):
        if stat.S_IMODE(path.lstat().st_mode) == mode and path.read_bytes() == data:
            return
    with writing(path, error):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(handle, mode)
                os.fsync(handle)
            os.replace(aside, path)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def writing(path: Path, error: type[CacheBuilderError], hint: str | None = None) -> Iterator[None]:
    """Turn an `OSError` into one sentence of the kind ``error``, which names ``path``."""
    try:
        yield
    except OSError as reason:
        raise error(f"{path}: cannot be written: {reason.strerror}", hint=hint) from reason


def make_folders(path: Path) -> list[Path]:
    """Make a folder and its parents, each 0755 whatever the umask; returns those that were made.

    Raises:
        OSError: one of them cannot be made.
    """
    made = [] if path.parent.is_dir() else make_folders(path.parent)
    try:
        os.mkdir(path, 0o755)
    except FileExistsError:
        if not path.is_dir():
            raise
        return made
    os.chmod(path, 0o755)
    return [*made, path]
