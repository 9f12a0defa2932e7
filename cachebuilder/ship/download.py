"""Downloads: bytes from elsewhere into a file, resumed, counted, checked, and put in place by one rename."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cachebuilder.artifact.whole import MAX_ARTIFACT_BYTES
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


def download(
    remote: RemoteFile, target: Path, retries: Retries, accept: Callable[[Path], object] = lambda path: None
) -> None:
    """Fetch a file into ``target``, whole or not at all.

    An interrupted download leaves a partial file beside ``target``, and the next download of the same version goes on
    from there. Two downloads at the same time use two partial files. A ``target`` that has the stated digest already
    is not fetched again.

    Args:
        accept: called with the whole file before it is put in place; if it raises, ``target`` stays as it was.

    Raises:
        TransferError: the file cannot be fetched, or has other bytes than stated; those bytes are removed.
        RestoreError: ``target`` cannot be written.
    """
    if remote.size > MAX_ARTIFACT_BYTES:
        raise TransferError(f"{remote.location}: wanted at most {MAX_ARTIFACT_BYTES} bytes, found {remote.size}")
    if remote.sha256 is not None and target.is_file() and sha256_of(target) == remote.sha256:
        accept(target)
        return
    version = hashlib.sha256(remote.version.encode()).hexdigest()[:16]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _partial_file(target.with_name(f".{target.name}.{version}.part")) as (file, path):
            try:
                _fill(_Partial(file), remote, retries)
                file.flush()
                accept(path)
                os.fchmod(file.fileno(), 0o644)
                os.replace(path, target)
            except _BrokenOff:
                raise  # what arrived is good: it stays for the next download
            except (CacheBuilderError, OSError):
                path.unlink(missing_ok=True)
                raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise RestoreError(
            f"{target}: cannot be written: {error.strerror}",
            hint="make room, and run the same command again" if full else None,
        ) from error


def sha256_of(path: Path) -> str:
    """A file's digest, in 64 hexadecimal digits. Raises `ArtifactError` if the file cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error


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

    def read_on() -> None:
        size_before = partial.size
        try:
            _read_on(partial, remote, retries)
        except Again as again:
            error = _BrokenOff(str(again.error), hint=again.error.hint)
            raise Again(error, again.after, moved=partial.size - size_before >= _WORTH_BYTES) from None

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


@contextlib.contextmanager
def _partial_file(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """The partial file ``path``, locked; if another process has it, a new one under a name of its own."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "r+b") as file:
            if not lock(handle):
                break
            is_current = False
            with contextlib.suppress(FileNotFoundError):  # another process has just finished it
                is_current = os.path.samestat(os.fstat(handle), os.stat(path))
            if is_current:
                yield file, path
                return
    own = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    handle = os.open(own, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "r+b") as file:
        try:
            yield file, own
        finally:
            own.unlink(missing_ok=True)
