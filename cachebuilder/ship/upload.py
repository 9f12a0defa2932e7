"""A blob on its way to a registry (distribution-spec 1.1, "Pushing Blobs")."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin

import requests

from cachebuilder.errors import ArtifactError, TransferError
from cachebuilder.ship.documents import wrong_digest
from cachebuilder.ship.locations import is_digest
from cachebuilder.ship.session import Session, origin

#: Sent at once.
_PART_BYTES = 1 << 20


@dataclass(frozen=True)
class Blob:
    """What is to be sent; never held in memory as a whole, where it is a file.

    Attributes:
        read: some bytes from an offset on, at most so many.
    """

    digest: str
    size: int
    read: Callable[[int, int], bytes]


def in_memory(digest: str, data: bytes) -> Blob:
    """These bytes."""
    return Blob(digest, len(data), lambda offset, count: data[offset : offset + count])


def in_file(digest: str, size: int, handle: int, path: Path) -> Blob:
    """A file that stays open; the handle's own position is left alone."""

    def read(offset: int, count: int) -> bytes:
        data = os.pread(handle, count, offset)
        if not data and offset < size:
            raise ArtifactError(f"{path}: wanted a file at rest, found one that became shorter")
        return data

    return Blob(digest, size, read)


class Upload:
    """One blob on its way; knows how far it came (distribution-spec, "Pushing blobs").

    The whole blob goes in one PATCH, as docker sends it, which every registry takes. After a break the registry is
    asked how much it has; distribution 2.8 forgets a torn upload, others go on.
    """

    def __init__(self, session: Session, start: str, blob: Blob, what: str) -> None:
        self._session, self._start, self._blob, self._what = session, start, blob, what
        self._location: str | None = None

    def send(self, told: Callable[[int], object]) -> None:
        """One try, from where the last one ended; ``told`` how many bytes are on their way.

        Raises:
            Again: it broke off.
            TransferError: the registry does not take it.
        """
        location, offset = self._where()
        size = self._blob.size
        if offset < size:
            headers = {"Content-Type": "application/octet-stream"}
            if offset:
                headers["Content-Range"] = f"{offset}-{size - 1}"
            response = self._session.send(
                "PATCH",
                location,
                accept=(202,),
                what=self._what,
                headers=headers,
                body=lambda: _Body(self._blob, offset, told),
            )
            response.close()
            location = self._location = self._next(response)
        response = self._session.send(
            "PUT",
            location,
            accept=(201,),
            what=self._what,
            params={"digest": self._blob.digest},
            headers={"Content-Length": "0"},
        )
        response.close()
        self._location = None
        named = response.headers.get("Docker-Content-Digest")
        if is_digest(named) and named != self._blob.digest:
            raise wrong_digest(self._what, self._blob.digest, str(named))

    def _where(self) -> tuple[str, int]:
        """Where to send on to, and from which byte on."""
        if self._location is not None:
            broken, self._location = self._location, None
            response = self._session.send("GET", broken, accept=(200, 204, 404, 400, 416), what=self._what)
            response.close()
            first, _, last = response.headers.get("Range", "").rpartition("=")[2].partition("-")
            # 0-0 is said of an upload with nothing in it, and of one with a byte: begin again then.
            some = first == "0" and last.isdigit() and 0 < int(last) < self._blob.size
            if response.status_code in (200, 204) and some:
                self._location = self._next(response)
                return self._location, int(last) + 1
        nothing = {"Content-Length": "0"}
        response = self._session.send("POST", self._start, accept=(202,), what=self._what, headers=nothing)
        response.close()
        self._location = self._next(response)
        return self._location, 0

    def _next(self, response: requests.Response) -> str:
        location = response.headers.get("Location")
        if not location:
            raise TransferError(f"{self._what}: {origin(response.url)} says not where to send on to")
        found = urljoin(response.url, location)
        if origin(found).startswith("http:") and self._session.base.startswith("https:"):
            raise TransferError(f"{self._what}: it is to be sent on to {origin(found)}, which has no TLS")
        return found


class _Body:
    """A request's body from an offset on, that tells how much is on its way."""

    def __init__(self, blob: Blob, offset: int, told: Callable[[int], object]) -> None:
        self._blob, self._offset, self._told = blob, offset, told

    def __len__(self) -> int:
        return self._blob.size - self._offset

    def __iter__(self) -> Iterator[bytes]:
        done = self._offset
        while done < self._blob.size:
            part = self._blob.read(done, min(_PART_BYTES, self._blob.size - done))
            yield part
            done += len(part)
            self._told(done)
