"""Write files whole or not at all, and make folders."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cachebuilder.errors import CacheBuilderError

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def write_new(name: str, data: bytes, mode: int, dir_fd: int | None = None) -> None:
    """Write a new file, with exactly ``mode`` regardless of the umask. Follows no link.

    Args:
        dir_fd: an open folder that a relative ``name`` is in; None for the current folder.

    Raises:
        OSError: it exists already, or cannot be written.
    """
    handle = os.open(name, _NEW_FILE, mode, dir_fd=dir_fd)
    with os.fdopen(handle, "wb") as file:
        os.fchmod(handle, mode)
        file.write(data)


def write_atomically(path: Path, data: bytes, error: type[CacheBuilderError], mode: int = 0o644) -> None:
    """Write ``data`` to ``path`` whole or not at all, replacing the file that was there.

    It is safe for several processes to write at once, and to be killed at any moment. A file that has these bytes and
    this mode already is left alone.

    Args:
        error: the kind of error to raise.

    Raises:
        CacheBuilderError: of the kind ``error``: the file or its folder cannot be written.
    """
    with contextlib.suppress(OSError):
        if stat.S_IMODE(path.lstat().st_mode) == mode and path.read_bytes() == data:
            return
    with writing(path, error):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(handle, mode)
                os.fsync(handle)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def writing(path: Path, error: type[CacheBuilderError], hint: str | None = None) -> Iterator[None]:
    """Turn an `OSError` inside the context into an error of the kind ``error`` that names ``path``."""
    try:
        yield
    except OSError as reason:
        raise error(f"{path}: cannot be written: {reason.strerror}", hint=hint) from reason


def make_folders(path: Path) -> list[Path]:
    """Make a folder and its missing parents, each with mode 0755 regardless of the umask; returns the new ones.

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
