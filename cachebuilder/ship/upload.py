"""The upload of one blob to a registry (distribution-spec 1.1, "Pushing Blobs")."""

from __future__ import annotations

import re
from collections.abc import Iterator

import requests

from cachebuilder.common.progress import Progress
from cachebuilder.errors import TransferError
from cachebuilder.ship.documents import wrong_digest
from cachebuilder.ship.locations import is_digest
from cachebuilder.ship.session import Request, Session, origin

_PART_BYTES = 1 << 20
_RANGE = re.compile(r"(?:.*=)?0-([0-9]{1,15})")
_NO_BODY = {"Content-Length": "0"}


class Upload:
    """The upload of one blob, which continues after a break where the registry allows it.

    The whole blob goes in one PATCH, as docker sends it, which every registry takes. After a break the registry is
    asked how much it has; distribution 2.8 forgets an interrupted upload, other registries continue it.

    Args:
        start: the path of the repository's uploads.
        digest: ``sha256:…`` of ``data``.
        what: what errors call the upload.
    """

    def __init__(self, session: Session, start: str, digest: str, data: bytes, what: str) -> None:
        self._session, self._start, self._digest, self._data, self._what = session, start, digest, data, what
        self._location: str | None = None

    def send(self, step: str, progress: Progress) -> None:
        """Try once, from where the last try ended.

        Args:
            step: the name under which ``progress`` hears of the bytes sent.

        Raises:
            Again: the connection broke.
            TransferError: the registry refuses the blob.
        """
        location, offset = self._location_and_offset()
        size = len(self._data)
        if offset < size:
            headers = {"Content-Type": "application/octet-stream"}
            if offset:
                headers["Content-Range"] = f"{offset}-{size - 1}"
            body = _Body(self._data, offset, step, progress)
            request = Request("PATCH", location, self._what, accept=(202,), headers=headers, body=lambda: body)
            response = self._session.send_unread(request)
            location = self._location = self._next_location(response)
        parameters = {"digest": self._digest}
        request = Request("PUT", location, self._what, accept=(201,), headers=_NO_BODY, params=parameters)
        response = self._session.send_unread(request)
        self._location = None
        stored_digest = response.headers.get("Docker-Content-Digest")
        if is_digest(stored_digest) and stored_digest != self._digest:
            raise wrong_digest(self._what, self._digest, str(stored_digest))

    def _location_and_offset(self) -> tuple[str, int]:
        """Where to send the rest, and the offset at which the rest begins."""
        if self._location is not None:
            interrupted, self._location = self._location, None
            request = Request("GET", interrupted, self._what, accept=(200, 204, 404, 400, 416))
            response = self._session.send_unread(request)
            match = _RANGE.fullmatch(response.headers.get("Range", ""))
            last = int(match[1]) if match else 0
            # A registry says 0-0 both for an empty upload and for one byte: begin again then.
            if response.status_code in (200, 204) and 0 < last < len(self._data):
                self._location = self._next_location(response)
                return self._location, last + 1
        request = Request("POST", self._start, self._what, accept=(202,), headers=_NO_BODY)
        response = self._session.send_unread(request)
        self._location = self._next_location(response)
        return self._location, 0

    def _next_location(self, response: requests.Response) -> str:
        location = response.headers.get("Location")
        if not location:
            raise TransferError(
                f"{self._what}: wanted the upload's next location from {origin(response.url)}, found none"
            )
        return self._session.next_url(response, location, self._what)


class _Body:
    """A request's body: the data from an offset on. It reports the bytes that were handed to the connection."""

    def __init__(self, data: bytes, offset: int, step: str, progress: Progress) -> None:
        self._data, self._offset, self._step, self._progress = data, offset, step, progress

    def __len__(self) -> int:
        return len(self._data) - self._offset

    def __iter__(self) -> Iterator[bytes]:
        size = len(self._data)
        for start in range(self._offset, size, _PART_BYTES):
            end = min(start + _PART_BYTES, size)
            yield self._data[start:end]
            self._progress(self._step, end, size)
