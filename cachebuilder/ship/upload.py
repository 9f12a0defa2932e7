"""A blob on its way to a registry (distribution-spec 1.1, "Pushing Blobs")."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from urllib.parse import urljoin

import requests

from cachebuilder.errors import TransferError
from cachebuilder.ship.documents import wrong_digest
from cachebuilder.ship.locations import is_digest
from cachebuilder.ship.session import Session, origin

#: Sent at once.
_PART_BYTES = 1 << 20


class Upload:
    """One blob on its way; knows how far it came (distribution-spec, "Pushing blobs").

    The whole blob goes in one PATCH, as docker sends it, which every registry takes. After a break the registry is
    asked how much it has; distribution 2.8 forgets a torn upload, others go on.
    """

    def __init__(self, session: Session, start: str, data: bytes, digest: str, what: str) -> None:
        self._session, self._start, self._data, self._digest, self._what = session, start, data, digest, what
        self._location: str | None = None

    def send(self, told: Callable[[int], object]) -> None:
        """One try, from where the last one ended; ``told`` how many bytes are on their way.

        Raises:
            Again: it broke off.
            TransferError: the registry does not take it.
        """
        location, offset = self._where()
        size = len(self._data)
        if offset < size:
            headers = {"Content-Type": "application/octet-stream"}
            if offset:
                headers["Content-Range"] = f"{offset}-{size - 1}"
            body = memoryview(self._data)[offset:]
            response = self._session.send(
                "PATCH",
                location,
                accept=(202,),
                what=self._what,
                headers=headers,
                body=lambda: _Body(body, lambda sent: told(offset + sent)),
            )
            response.close()
            location = self._location = self._next(response)
        response = self._session.send(
            "PUT",
            location,
            accept=(201,),
            what=self._what,
            params={"digest": self._digest},
            headers={"Content-Length": "0"},
        )
        response.close()
        self._location = None
        named = response.headers.get("Docker-Content-Digest")
        if is_digest(named) and named != self._digest:
            raise wrong_digest(self._what, self._digest, str(named))

    def _where(self) -> tuple[str, int]:
        """Where to send on to, and from which byte on."""
        if self._location is not None:
            broken, self._location = self._location, None
            response = self._session.send("GET", broken, accept=(200, 204, 404, 400, 416), what=self._what)
            response.close()
            first, _, last = response.headers.get("Range", "").rpartition("=")[2].partition("-")
            # 0-0 is said of an upload with nothing in it, and of one with a byte: begin again then.
            some = first == "0" and last.isdigit() and 0 < int(last) < len(self._data)
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
    """A request's body that tells how much of it is on its way."""

    def __init__(self, data: memoryview, told: Callable[[int], object]) -> None:
        self._data, self._told = data, told

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[memoryview]:
        for start in range(0, len(self._data), _PART_BYTES):
            yield self._data[start : start + _PART_BYTES]
            self._told(min(start + _PART_BYTES, len(self._data)))
