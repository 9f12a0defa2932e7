"""Bytes from elsewhere into a file: resumed, counted, checked, and then put in place by one rename."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from cachebuilder.artifact.whole import MAX_ARTIFACT_BYTES
from cachebuilder.common.locks import lock
from cachebuilder.errors import ArtifactError, CacheBuilderError, RestoreError, TransferError
from cachebuilder.ship.retry import Again, Retries

#: A try that got this far begins the count of failures anew; less, and a sick server could keep us for ever.
_WORTH_BYTES = 8 << 20

#: From an offset on: where it really begins (the offset, or 0), and the bytes. Raises `Again` where it breaks off.
Source = Callable[[int], tuple[int, Iterator[bytes]]]


def download(
    target: Path,
    source: Source,
    size: int,
    key: str,
    retries: Retries,
    what: str,
    sha256: str | None = None,
    accept: Callable[[Path], object] = lambda path: None,
) -> None:
    """Fetch ``size`` bytes into ``target``, whole or not at all.

    What a killed or failed fetch got lies beside ``target`` under a name made of ``key``, and the next one goes on
    from there; two at once do not meet.

    Args:
        key: names these very bytes: a digest, or a version.
        what: what is fetched, for errors.
        sha256: what it must be; None where nobody has said. A ``target`` with these bytes is not fetched again.
        accept: called with the whole file before it is put in place; what it raises leaves ``target`` as it was.

    Raises:
        TransferError: it cannot be had, or is not what was asked for; nothing of it is left then.
        RestoreError: it cannot be written.
    """
    if size > MAX_ARTIFACT_BYTES:
        raise TransferError(f"{what}: wanted at most {MAX_ARTIFACT_BYTES} bytes, found {size}")
    aside = target.with_name(f".{target.name}.{hashlib.sha256(key.encode()).hexdigest()[:16]}.part")
    if sha256 is not None and target.is_file() and sha256_of(target) == sha256:
        accept(target)
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _opened(aside) as (file, path):
            try:
                _fill(file, source, size, retries, what, sha256)
                accept(path)
                os.fchmod(file.fileno(), 0o644)
                os.replace(path, target)
            except OSError as error:
                path.unlink(missing_ok=True)
                raise _unwritable(target, error) from error
            except _BrokenOff:
                raise
            except CacheBuilderError:
                path.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise _unwritable(target, error) from error


def sha256_of(path: Path) -> str:
    """A file's digest. Raises `ArtifactError` where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error


class _BrokenOff(TransferError):
    """What was got so far is good."""


def _fill(file: BinaryIO, source: Source, size: int, retries: Retries, what: str, sha256: str | None) -> None:
    """Read until ``file`` has ``size`` bytes, of this digest where one is given."""
    digest = hashlib.sha256()
    done = 0
    while part := file.read(1 << 20):  # of an earlier fetch
        digest.update(part)
        done += len(part)
    resumed = done > 0

    def restart() -> None:
        nonlocal digest, done
        file.seek(0)
        file.truncate()
        digest, done = hashlib.sha256(), 0

    def read_on() -> None:
        nonlocal done
        before = done
        try:
            if done == size:
                return
            start, parts = source(done)
            if start != done:
                restart()
            for part in parts:
                if done + len(part) > size:
                    raise TransferError(f"{what}: wanted {size} bytes, found more")
                file.write(part)
                digest.update(part)
                done += len(part)
                retries.watcher.progress("fetch", done, size)
            if done < size:
                raise Again(TransferError(f"{what}: truncated: it ends after {done} of {size} bytes"))
        except Again as again:
            broken = _BrokenOff(str(again.error), hint=again.error.hint)
            raise Again(broken, again.after, moved=done - before >= _WORTH_BYTES) from None

    if done > size:
        restart()
    retries.run(read_on)
    if sha256 not in (None, digest.hexdigest()) and resumed:  # the fault of what was there before?
        restart()
        retries.run(read_on)
    if sha256 not in (None, found := digest.hexdigest()):
        raise TransferError(
            f"{what}: not the bytes that were asked for\nwanted: sha256 {sha256}\nfound:  sha256 {found}",
            hint="fetch again; if it stays so, the registry or something before it is broken, or not yours",
        )
    file.flush()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """The partial file, ours alone; another one, of a name of its own, where somebody else writes this one."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "r+b") as file:
            if not lock(handle):
                break
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(path)):  # else somebody has just finished it
                    yield file, path
                    return
    own = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    handle = os.open(own, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "r+b") as file:
        try:
            yield file, own
        finally:
            own.unlink(missing_ok=True)


def _unwritable(target: Path, error: OSError) -> RestoreError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    hint = "make room, and run the same again" if full else None
    return RestoreError(f"{target}: cannot be written: {error.strerror}", hint=hint)
