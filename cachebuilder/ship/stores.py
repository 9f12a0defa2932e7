"""Object stores through `fsspec`: ``s3://…``, ``gs://…``, and whatever else it has a file system for.

Stores have no digest in common, so a location may state one: ``s3://b/a.tar.zst#sha256=…``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cachebuilder.artifact.whole import read_beside, read_bytes
from cachebuilder.errors import TransferError
from cachebuilder.ship.description import BESIDE
from cachebuilder.ship.download import RemoteFile, Target, download
from cachebuilder.ship.locations import printable, shown
from cachebuilder.ship.objects import Objects, failure
from cachebuilder.ship.pull import Check, put_beside
from cachebuilder.ship.retry import Retries

#: Bytes of one request: a broken one costs no more than this again.
_RANGE_BYTES = 16 << 20
_PIN = re.compile(r"sha256=([0-9a-f]{64})")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")


@dataclass(frozen=True)
class Stored:
    """An object as the store describes it now; its version is its ETag, or what the store has instead."""

    size: int
    version: str


class Store:
    """One object, and the objects beside it that are signed.

    Attributes:
        location: what messages and records call it: without a user, a password or a signed query.

    Raises:
        InstallationError: the package for this scheme is not installed.
        TransferError: from every call: the store cannot be reached, refuses, or has no such object.
    """

    def __init__(self, location: str, retries: Retries) -> None:
        url, _, pin = location.partition("#")
        self.location = shown(url)
        self._retries = retries
        self.sha256: str | None = None
        if pin:
            if (match := _PIN.fullmatch(pin)) is None:
                raise TransferError(
                    f"{self.location}: wanted #sha256= and 64 hexadecimal digits, found #{printable(pin)}"
                )
            self.sha256 = match[1]
        if "::" in url or not _FILE.fullmatch(url.rpartition("/")[2]):
            raise TransferError(
                f"{self.location}: wanted an object's name at the end, as in s3://bucket/caches/a.tar.zst"
            )
        self._objects = Objects(url, self.location, retries)
        self._path = self._objects.path

    @property
    def name(self) -> str:
        """The last part of the object's name."""
        return self.location.rpartition("/")[2]

    def describe(self) -> Stored:
        """The object as it is now."""
        info = self._objects.ask("info", self._path)
        size = info.get("size")
        if info.get("type") != "file" or type(size) is not int:
            raise TransferError(f"{self.location}: wanted an object, found a folder or something else")
        version = info.get("ETag") or info.get("etag") or info.get("md5Hash") or self._objects.fs.ukey(self._path)
        return Stored(size, str(version).strip('"'))

    def fetch(self, stored: Stored, to: Callable[[str], Target], check: Check | None = None) -> Path:
        """Fetch the object and the signed objects beside it; arguments, result and errors as of `Puller.fetch`."""
        remote = RemoteFile(
            self.location,
            stored.size,
            version=f"{self.location} {stored.version}",
            sha256=self.sha256,
            read=lambda offset: (offset, self._ranges(offset, stored)),
        )
        with to(self.name) as target:

            def accept(whole: BinaryIO) -> None:
                if self.describe() != stored:
                    raise TransferError(f"{self.location}: the object changed during the fetch", hint="fetch it again")
                files = self._read_beside()
                if check is not None:
                    check(whole.read(), files)
                put_beside(target, files)

            download(remote, target, self._retries, accept)
            return target.path

    def put(self, artifact: Path) -> None:
        """Store an artifact under this name, after the signed files beside it."""
        data = read_bytes(artifact)
        for suffix, (_, most) in BESIDE.items():
            beside = read_beside(artifact.with_name(artifact.name + suffix), most)
            if beside is not None:
                self._objects.ask("pipe_file", self._path + suffix, beside)
            elif self._objects.ask("exists", self._path + suffix):
                self._objects.ask("rm_file", self._path + suffix)
        self._objects.ask("pipe_file", self._path, data)
        self._retries.watcher.progress(f"push {artifact.name}", len(data), len(data))

    def _ranges(self, offset: int, stored: Stored) -> Iterator[bytes]:
        while offset < stored.size:
            end = min(offset + _RANGE_BYTES, stored.size)
            try:
                deadline = self._objects.deadline(end - offset)
                part = self._objects.fs.cat_file(self._path, start=offset, end=end, **deadline)
            except Exception as error:
                raise failure(error, self.location) from None
            if not part:
                return
            yield part
            offset += len(part)

    def _read_beside(self) -> dict[str, bytes]:
        """The signed objects beside this one, by suffix."""
        files = {}
        for suffix, (_, most) in BESIDE.items():
            path = self._path + suffix
            if not self._objects.ask("exists", path):
                continue
            size = self._objects.ask("info", path).get("size")
            if type(size) is not int or size > most:
                raise TransferError(f"{self.location}{suffix}: wanted at most {most} bytes, found {size}")
            files[suffix] = self._objects.ask("cat_file", path, start=0, end=size)
        return files


def put_all(destination: str, artifacts: Sequence[Path], retries: Retries) -> list[str]:
    """Store one artifact as ``destination``, or several in it if it ends with ``/``; returns each one's location."""
    if not destination.endswith("/") and len(artifacts) > 1:
        raise TransferError(
            f"{shown(destination)}: wanted a folder, which ends with /, for {len(artifacts)} artifacts, "
            "found an object's name"
        )
    locations = []
    for artifact in artifacts:
        store = Store(destination + artifact.name if destination.endswith("/") else destination, retries)
        store.put(artifact)
        locations.append(store.location)
    return locations
