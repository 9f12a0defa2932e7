"""Folders by handle: what is done below an open folder stays below it, whoever else may write there.

Each call looks a path up anew. Another user who may write into a folder on that path can put a link there between two
calls. A handle stays what it was when it was opened. So a folder is opened once, and everything below it is opened,
made, renamed and removed by its name in that open folder. A name is one name, never a path of several. Links are not
followed, and files that are not regular are not read.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Self

_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: Without O_NONBLOCK, opening a FIFO waits for a writer.
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class WrongFile(OSError):
    """What is there is not what may be used: a link, another kind of file, one that is too large or another user's."""


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


def is_safe(status: os.stat_result, *users: int) -> bool:
    """Whether nobody but this user, root and ``users`` can change a file or folder: by its owner and its mode."""
    return status.st_uid in (0, os.geteuid(), *users) and not others_may_write(status)


def others_may_write(status: os.stat_result) -> bool:
    """Whether a file's or a folder's mode lets users other than its owner write.

    A group with its owner's number has only that user in it: Linux distributions make one for each user, and then a
    umask of 002 is usual.
    """
    shared_group = status.st_gid != status.st_uid
    return bool(status.st_mode & (stat.S_IWOTH | (stat.S_IWGRP if shared_group else 0)))


def read_regular(path: Path, most: int) -> bytes:
    """All bytes of the file at a path that the user named, if it is a regular file and no link.

    Raises:
        WrongFile: it is something else, or has more than ``most`` bytes.
        OSError: it cannot be read.
    """
    with Folder.at(path.parent) as folder:
        return folder.read(path.name, most)


class Folder:
    """An open folder. Every `OSError` of its methods names the whole path, for messages only.

        with Folder.at(dir) as folder, folder.make("cachebuilder") as own:
            own.write("version.txt", data, 0o644)

    Attributes:
        handle: its file descriptor.
        path: what errors call it.
    """

    def __init__(self, handle: int, path: Path) -> None:
        self.handle = handle
        self.path = path

    @classmethod
    def at(cls, path: Path) -> Self:
        """Open the folder at a path that the user named: the path, and only it, may go through links."""
        return cls(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), path)

    @classmethod
    def make_at(cls, path: Path, *, exact: bool = True, made: list[MadeFolder] | None = None) -> Self:
        """Open the folder at a path that the user named; it and its missing parents are made as `make` makes them."""
        with contextlib.suppress(FileNotFoundError):
            return cls.at(path)
        with cls.make_at(path.parent, exact=exact, made=made) as parent:
            return parent.make(path.name, exact=exact, made=made)

    def open(self, name: str) -> Self:
        """Open a folder in this one. Raises `WrongFile` if it is a link, `OSError` if it is no folder."""
        path = self.path / name
        try:
            return type(self)(os.open(name, _OPEN_FOLDER, dir_fd=self.handle), path)
        except OSError as error:
            raise self._explained(error, name, "a folder") from None

    def make(self, name: str, mode: int = 0o755, *, exact: bool = True, made: list[MadeFolder] | None = None) -> Self:
        """Open a folder in this one; if it is missing, it is made, with exactly ``mode`` regardless of the umask.

        Args:
            exact: False lets the umask take permissions away.
            made: gets the folder appended if it was made now.
        """
        try:
            with self._naming(name):
                os.mkdir(name, mode, dir_fd=self.handle)
        except FileExistsError:
            return self.open(name)
        folder = self.open(name)
        try:
            # Another user who may write into this folder could have exchanged the new one before it was opened.
            if not folder.is_ours():
                raise OSError(
                    errno.EPERM, "wanted the folder that was just made, found another user's", str(folder.path)
                )
            if exact and stat.S_IMODE(folder.status().st_mode) != mode:
                os.fchmod(folder.handle, mode)
            if made is not None:
                made.append(MadeFolder(self._duplicate(), name))
        except BaseException:
            folder.close()
            raise
        return folder

    def names(self) -> list[str]:
        """The names of everything in it, sorted."""
        return sorted(os.listdir(self.handle))

    def status(self, name: str | None = None) -> os.stat_result:
        """The status of the folder itself, or of something in it; a link's own status if that is a link."""
        if name is None:
            return os.fstat(self.handle)
        with self._naming(name):
            return os.stat(name, dir_fd=self.handle, follow_symlinks=False)

    def is_ours(self) -> bool:
        """Whether this user owns it.

        Some file systems give everything to one user, whoever makes it (NFS with root_squash, FUSE): there the owner of
        a new file counts.
        """
        owner = self.status().st_uid
        if owner == os.geteuid():
            return True
        probe = f".owner-{secrets.token_hex(8)}"
        try:
            handle = os.open(probe, _NEW_FILE, 0o600, dir_fd=self.handle)
        except OSError:
            return False
        try:
            return os.fstat(handle).st_uid == owner
        finally:
            os.close(handle)
            with contextlib.suppress(OSError):
                os.unlink(probe, dir_fd=self.handle)

    def is_foreign(self) -> bool:
        """Whether a user other than this one and root owns it, and so can exchange whatever is put into it."""
        return self.status().st_uid != 0 and not self.is_ours()

    def open_file(self, name: str) -> BufferedReader:
        """Open a regular file in it for reading. Raises `WrongFile` if it is a link or not a regular file."""
        try:
            handle = os.open(name, _OPEN_FILE, dir_fd=self.handle)
        except OSError as error:
            raise self._explained(error, name, "a file") from None
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise WrongFile(errno.EINVAL, "wanted a regular file, found another kind of file", str(self.path / name))
        return os.fdopen(handle, "rb")

    def read(self, name: str, most: int) -> bytes:
        """All bytes of a regular file. Raises `WrongFile` as `open_file` does, and if it has more than ``most``."""
        with self.open_file(name) as file:
            return self._read(file, name, most)

    def holds_safe(self, name: str) -> bool:
        """Whether a folder of ours has a regular file of this name that no other user could have changed."""
        try:
            status = self.status(name)
        except OSError:
            return False
        return stat.S_ISREG(status.st_mode) and is_safe(status, self.status().st_uid)

    def read_safe(self, name: str, most: int) -> bytes | None:
        """All bytes of a file in a folder of ours; None if there is none, or if another user could have changed it."""
        try:
            with self.open_file(name) as file:
                if is_safe(os.fstat(file.fileno()), self.status().st_uid):
                    return self._read(file, name, most)
        except OSError:
            pass
        return None

    def write_new(self, name: str, data: bytes, mode: int) -> None:
        """Write a file that must not exist yet, with exactly ``mode`` regardless of the umask."""
        with self._naming(name):
            write_new(name, data, mode, self.handle)

    def write(self, name: str, data: bytes, mode: int) -> None:
        """Write a file whole or not at all, in place of the one that was there, and flush it to the disk.

        A file of this user or root that has these bytes and this mode already is left alone.
        """
        if self._has(name, data, mode):
            return
        temporary = f".{name}.{secrets.token_hex(8)}"
        with self._naming(name):
            try:
                handle = os.open(temporary, _NEW_FILE, 0o600, dir_fd=self.handle)
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fchmod(handle, mode)
                    os.fsync(handle)
                os.rename(temporary, name, src_dir_fd=self.handle, dst_dir_fd=self.handle)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=self.handle)
                raise

    def rename(self, name: str, to: str, folder: Folder | None = None) -> None:
        """Rename something in it to ``to``, in this folder or in another one. An empty folder or a file there goes."""
        target = folder or self
        with target._naming(to):
            os.rename(name, to, src_dir_fd=self.handle, dst_dir_fd=target.handle)

    def unlink(self, name: str) -> None:
        """Remove a file or a link in it."""
        with self._naming(name):
            os.unlink(name, dir_fd=self.handle)

    def rmdir(self, name: str) -> None:
        """Remove an empty folder in it."""
        with self._naming(name):
            os.rmdir(name, dir_fd=self.handle)

    def clear(self) -> None:
        """Remove everything in it that can be removed. Links are removed, not followed."""
        for name in self.names():
            try:
                os.unlink(name, dir_fd=self.handle)
            except OSError:  # a folder, or nothing that this user may remove
                shutil.rmtree(name, ignore_errors=True, dir_fd=self.handle)

    def remove(self, name: str) -> None:
        """Remove a file, a link, or a folder with all that is in it. Nothing happens if it cannot be removed."""
        with contextlib.suppress(OSError):
            try:
                folder = self.open(name)
            except OSError:
                return self.unlink(name)
            with folder:
                folder.clear()
            self.rmdir(name)

    def close(self) -> None:
        """Close it. Nothing else may be called afterwards."""
        os.close(self.handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _duplicate(self) -> Folder:
        return Folder(os.dup(self.handle), self.path)

    def _read(self, file: BufferedReader, name: str, most: int) -> bytes:
        size = os.fstat(file.fileno()).st_size
        data = file.read(most + 1) if size <= most else b""
        if max(size, len(data)) > most:
            raise WrongFile(errno.EINVAL, f"wanted at most {most} bytes, found more", str(self.path / name))
        return data

    def _has(self, name: str, data: bytes, mode: int) -> bool:
        try:
            with self.open_file(name) as file:
                status = os.fstat(file.fileno())
                same = stat.S_IMODE(status.st_mode) == mode and status.st_uid in (0, os.geteuid())
                return same and status.st_nlink == 1 and status.st_size == len(data) and file.read() == data
        except OSError:
            return False

    @contextlib.contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Give an `OSError` the whole path."""
        try:
            yield
        except OSError as error:
            error.filename, error.filename2 = str(self.path / name), None
            raise

    def _explained(self, error: OSError, name: str, wanted: str) -> OSError:
        """The error of an open that may have met a link."""
        path = str(self.path / name)
        try:
            is_link = stat.S_ISLNK(self.status(name).st_mode)
        except OSError:
            is_link = False
        if is_link:
            return WrongFile(errno.ELOOP, f"wanted {wanted}, found a link", path)
        return OSError(error.errno, error.strerror, path)


@dataclass(frozen=True)
class MadeFolder:
    """A folder that was made now: its parent, which stays open, and its name."""

    parent: Folder
    name: str

    def remove(self) -> None:
        """Remove it if it is empty, and close its parent."""
        with self.parent, contextlib.suppress(OSError):
            self.parent.rmdir(self.name)

    def keep(self) -> None:
        """Let it stay, and close its parent."""
        self.parent.close()


@contextmanager
def open_below(folder: Folder, path: str) -> Iterator[Folder]:
    """The folder at ``path`` below ``folder``, opened name by name. Raises as `Folder.open` does."""
    with contextlib.ExitStack() as stack:
        for name in path.split("/"):
            folder = stack.enter_context(folder.open(name))
        yield folder
