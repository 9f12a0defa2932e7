"""Folders, and files that appear whole or not at all, with nothing imported that is slow to import."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def write_new(name: str, data: bytes, mode: int, dir_fd: int | None = None, masked: bool = True) -> None:
    """Write a file that must not exist yet. No link is followed.

    Args:
        masked: whether a umask may be in the way of ``mode``.
    """
    handle = os.open(name, _NEW, mode, dir_fd=dir_fd)
    try:
        if masked:
            os.fchmod(handle, mode)
        while data:
            data = data[os.write(handle, data) :]
    finally:
        os.close(handle)


def make_folders(path: Path) -> list[Path]:
    """Make a folder and its parents, each 0755 whatever the umask; returns those that were not there."""
    made = [] if path.parent.is_dir() else make_folders(path.parent)
    try:
        os.mkdir(path, 0o755)
    except FileExistsError:
        if not path.is_dir():
            raise
        return made
    os.chmod(path, 0o755)
    return [*made, path]


def put(path: Path, data: bytes, mode: int) -> None:
    """Put ``data`` at ``path`` by rename, whatever was there; does nothing where the same is there already.

    Not flushed to the disk: what is put here is made again by running the same command again.
    """
    with contextlib.suppress(OSError):
        if path.read_bytes() == data and path.stat().st_mode & 0o777 == mode:
            return
    aside = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    try:
        write_new(str(aside), data, mode)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
