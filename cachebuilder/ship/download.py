"""Downloads: bytes from elsewhere into a file, resumed, counted, checked, and put in place by one rename."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from cachebuilder.artifact.whole import MAX_ARTIFACT_BYTES, open_file
from cachebuilder.common.folders import Folder, is_safe
from cachebuilder.common.locks import lock
from cachebuilder.errors import ArtifactError, CacheBuilderError, RestoreError, TransferError
from cachebuilder.ship.documents import wrong_digest
from cachebuilder.ship.retry import Again, Retries

_PART_BYTES = 1 << 20
#: A failed try that transferred this much resets the count of failures. With less, a sick server could keep a
#: download going for ever.
_WORTH_BYTES = 8 << 20


@dataclass(frozen=True)
class RemoteFile:
    """A file elsewhere, as it is now.

    Attributes:
        location: what errors call it.
        size: in bytes.
        version: names exactly these bytes: a digest, or the location and the store's version of it.
        sha256: the digest that the bytes must have, in 64 hexadecimal digits; None if nobody has stated one.
        read: takes an offset; returns the offset at which its bytes really begin, the same one or 0, and the bytes.
            Raises `Again` if the connection breaks.
    """

    location: str
    size: int
    version: str
    sha256: str | None
    read: Callable[[int], tuple[int, Iterator[bytes]]]

    def __post_init__(self) -> None:
        """Raise `TransferError` if it is larger than any artifact."""
        if self.size > MAX_ARTIFACT_BYTES:
            raise TransferError(f"{self.location}: wanted at most {MAX_ARTIFACT_BYTES} bytes, found {self.size}")


@dataclass(frozen=True)
class Target:
    """Where a file goes: its name in an open folder, which is closed at the end of the context."""

    folder: Folder
    name: str

    @classmethod
    def at(cls, path: Path) -> Self:
        """The file at a path that the user named; its folder is made if it is missing."""
        try:
            return cls(Folder.make_at(path.parent, exact=False), path.name)
        except OSError as error:
            raise _cannot_write(path, error) from error

    @property
    def path(self) -> Path:
        """The file's path, for messages and for readers."""
        return self.folder.path / self.name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.close()


def download(
    remote: RemoteFile, target: Target, retries: Retries, accept: Callable[[BinaryIO], object] = lambda file: None
) -> None:
    """Fetch a file into ``target``, whole or not at all.

    An interrupted download leaves a partial file beside ``target``, and the next download of the same version goes on
    from there. Two downloads at the same time use two partial files. A ``target`` that has the stated digest already
    is not fetched again.

    Others may write into the folder. Only a file that nobody else can change is continued, or taken as it is; what
    becomes ``target`` is the file that was written and checked here, and was never open to anybody else.

    Args:
        accept: called with the whole file, at its beginning, before it is put in place; if it raises, ``target`` stays
            as it was.

    Raises:
        TransferError: the file cannot be fetched, or has other bytes than stated; those bytes are removed.
        RestoreError: ``target`` cannot be written.
    """
    version = hashlib.sha256(remote.version.encode()).hexdigest()[:16]
    folder = target.folder
    try:
        if remote.sha256 is not None and _is_complete(target, remote.sha256, accept):
            return
        with _partial_file(folder, f".{target.name}.{version}.part") as (file, name):
            try:
                _fill(_Partial(file), remote, retries)
                file.flush()
                file.seek(0)
                accept(file)
                os.fchmod(file.fileno(), 0o644)
                if not _is_at(folder, name, file):
                    raise _exchanged(folder.path / name)
                folder.rename(name, target.name)
                # Another download of this user may have put its own file there meanwhile; another user may not.
                if not _is_at(folder, target.name, file) and not is_safe(folder.status(target.name)):
                    raise _exchanged(target.path)
            except _BrokenOff:
                raise  # what arrived is good: it stays for the next download
            except (CacheBuilderError, OSError):
                if _is_at(folder, name, file):
                    folder.unlink(name)
                raise
    except OSError as error:
        raise _cannot_write(target.path, error) from error


def sha256_of(path: Path) -> str:
    """A file's digest, in 64 hexadecimal digits. Raises `ArtifactError` if it is no regular file or cannot be read."""
    try:
        with open_file(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error


def _cannot_write(path: Path, error: OSError) -> RestoreError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return RestoreError(
        f"{path}: cannot be written: {error.strerror}",
        hint="make room, and run the same command again" if full else None,
    )


def _is_complete(target: Target, sha256: str, accept: Callable[[BinaryIO], object]) -> bool:
    """Whether the target is there already, with these bytes, and nobody else can change it."""
    try:
        file = target.folder.open_file(target.name)
    except OSError:
        return False
    with file:
        if not is_safe(os.fstat(file.fileno())) or hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            return False
        file.seek(0)
        accept(file)
        return True


def _is_at(folder: Folder, name: str, file: BinaryIO) -> bool:
    """Whether the name is that of the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), folder.status(name))
    except OSError:
        return False


class _BrokenOff(TransferError):
    """The transfer broke off; the bytes that arrived are good."""


class _Partial:
    """A file that a download fills, with the size and the digest of the bytes in it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size, self._sha256 = 0, hashlib.sha256()
        while part := file.read(_PART_BYTES):  # the bytes of an interrupted download
            self._count(part)

    def append(self, part: bytes) -> None:
        self._file.write(part)
        self._count(part)

    def clear(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self.size, self._sha256 = 0, hashlib.sha256()

    def has(self, sha256: str | None) -> bool:
        """Whether the bytes have this digest; True if there is none to compare with."""
        return sha256 is None or sha256 == self.sha256

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def _count(self, part: bytes) -> None:
        self._sha256.update(part)
        self.size += len(part)


def _fill(partial: _Partial, remote: RemoteFile, retries: Retries) -> None:
    """Read until the partial file is the whole one."""
    resumed = partial.size > 0
    most_before = partial.size  # bytes that are sent again do not count, or a sick server could go on for ever

    def read_on() -> None:
        nonlocal most_before
        try:
            _read_on(partial, remote, retries)
        except Again as again:
            error = _BrokenOff(str(again.error), hint=again.error.hint)
            moved = partial.size - most_before >= _WORTH_BYTES
            most_before = max(most_before, partial.size)
            raise Again(error, again.after, moved) from None

    if partial.size > remote.size:
        partial.clear()
    retries.run(read_on)
    if resumed and not partial.has(remote.sha256):  # the bytes of the interrupted download may be the wrong ones
        partial.clear()
        retries.run(read_on)
    if not partial.has(remote.sha256):
        raise wrong_digest(remote.location, f"sha256:{remote.sha256}", f"sha256:{partial.sha256}")


def _read_on(partial: _Partial, remote: RemoteFile, retries: Retries) -> None:
    """Read once, from the end of the partial file on."""
    if partial.size == remote.size:
        return
    offset, parts = remote.read(partial.size)
    if offset != partial.size:
        partial.clear()
    for part in parts:
        if partial.size + len(part) > remote.size:
            raise TransferError(f"{remote.location}: wanted {remote.size} bytes, found more")
        partial.append(part)
        retries.watcher.progress("fetch", partial.size, remote.size)
    if partial.size < remote.size:
        raise Again(TransferError(f"{remote.location}: truncated: it ends after {partial.size} of {remote.size} bytes"))


def _exchanged(path: Path) -> RestoreError:
    return RestoreError(
        f"{path}: wanted the file that was fetched, found another one in its place",
        hint="another user changes this folder: choose one that only you can write",
    )


@contextlib.contextmanager
def _partial_file(folder: Folder, name: str) -> Iterator[tuple[BinaryIO, str]]:
    """The partial file of this name, locked; if another process or another user has it, a new one of its own name."""
    while (handle := _open_partial(folder, name)) is not None:
        with os.fdopen(handle, "r+b") as file:
            if not lock(handle):
                break
            if _is_at(folder, name, file):  # else another process has just finished it
                yield file, name
                return
    own = f"{name}.{secrets.token_hex(8)}"
    handle = os.open(own, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder.handle)
    with os.fdopen(handle, "r+b") as file:
        try:
            yield file, own
        finally:
            with contextlib.suppress(OSError):
                folder.unlink(own)


def _open_partial(folder: Folder, name: str) -> int | None:
    """Make a partial file or open the one of an earlier download; None where another user may have it open.

    Nobody else can have opened a file that this user made with mode 0600, and that has no second name.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with contextlib.suppress(FileExistsError):
        return os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder.handle)
    try:
        handle = os.open(name, flags, dir_fd=folder.handle)
    except OSError:
        return None
    status = os.fstat(handle)
    if (status.st_mode, status.st_uid, status.st_nlink) != (stat.S_IFREG | 0o600, os.geteuid(), 1):
        os.close(handle)
        return None
    return handle
