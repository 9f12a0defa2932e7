"""A repository in an OCI registry: the calls of distribution-spec 1.1 that pushing and pulling need.

https://github.com/opencontainers/distribution-spec/blob/v1.1.0/spec.md
"""

from __future__ import annotations

from collections.abc import Iterator

import requests

from cachebuilder.errors import TransferError
from cachebuilder.ship import credentials
from cachebuilder.ship.documents import (
    INDEX,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    Descriptor,
    Manifest,
    digest_of,
    entries,
    index_document,
    read_manifest,
    wrong_digest,
)
from cachebuilder.ship.locations import Reference, is_digest
from cachebuilder.ship.retry import Retries
from cachebuilder.ship.session import Session, parts, read
from cachebuilder.ship.upload import Blob, Upload

#: Other tools' names for the same two, taken where a registry has changed ours.
_DOCKER = (
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)


#: What registries answer that do not know the path, or do not want to.
_NO_REFERRERS = (400, 403, 404, 405, 406, 501)


class Repository:
    """One repository. Every call is tried again where that may help.

    Raises:
        TransferError: from every call: the registry cannot be reached, refuses, or gives something else than asked for.
    """

    def __init__(self, reference: Reference, retries: Retries) -> None:
        self.reference = reference
        self._retries = retries
        host = "registry-1.docker.io" if reference.host == "docker.io" else reference.host
        base = f"{'http' if reference.plain else 'https'}://{host}"
        self._session = Session(base, lambda: credentials.find(reference.host))
        self._path = f"/v2/{reference.name}"

    # Reading

    def manifest(self, wanted: str, what: str | None = None) -> Manifest:
        """A manifest or an index by tag or digest; one that is asked for by its digest has that digest."""
        found = self._manifest(wanted, what or str(self.reference))
        if found is None:
            raise TransferError(f"{self.reference}: not found", hint="check the repository and the tag or digest")
        return found

    def _manifest(self, wanted: str, what: str) -> Manifest | None:
        def get() -> Manifest | None:
            response = self._session.send(
                "GET",
                f"{self._path}/manifests/{wanted}",
                accept=(200, 404),
                what=what,
                headers={"Accept": ", ".join((INDEX, MANIFEST, *_DOCKER))},
            )
            if response.status_code == 404:
                response.close()
                return None
            data = read(response, MAX_MANIFEST_BYTES, what)
            digest = digest_of(data)
            if is_digest(wanted) and digest != wanted:
                raise wrong_digest(what, wanted, digest)
            named = response.headers.get("Docker-Content-Digest")
            if is_digest(named) and digest != named:
                raise wrong_digest(f"{what}, which the registry says is {named}", str(named), digest)
            return read_manifest(data, response.headers.get("Content-Type", ""), what)

        return self._retries.run(get)

    def blob(self, blob: Descriptor, offset: int, what: str) -> tuple[int, Iterator[bytes]]:
        """A blob's bytes from ``offset`` on, or from 0 on where the registry does not take offsets; and from which.

        One try; its digest is not checked.

        Raises:
            Again: from here or from the bytes: it broke off.
        """
        url = f"{self._path}/blobs/{blob.digest}"
        headers = {"Range": f"bytes={offset}-"} if offset else None
        response = self._session.send("GET", url, accept=(200, 206, 416), what=what, headers=headers)
        if response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
            return offset, parts(response, what)
        if response.status_code != 200:
            response.close()
            response = self._session.send("GET", url, accept=(200,), what=what)
        return 0, parts(response, what)

    def small_blob(self, blob: Descriptor, most: int, what: str) -> bytes:
        """A blob whole, in memory; checked."""
        if blob.size > most:
            raise TransferError(f"{what}: wanted at most {most} bytes, found {blob.size}")

        def get() -> bytes:
            response = self._session.send("GET", f"{self._path}/blobs/{blob.digest}", accept=(200,), what=what)
            return read(response, most, what)

        data = self._retries.run(get)
        if (found := digest_of(data)) != blob.digest:
            raise wrong_digest(what, blob.digest, found)
        return data

    def referrers(self, digest: str) -> list[Descriptor]:
        """What refers to a manifest; by the tag of the referrers schema where the registry has no API for it."""
        what = f"what is attached to {self.reference.at(digest)}"

        def get() -> Manifest | None:
            response = self._session.send(
                "GET",
                f"{self._path}/referrers/{digest}",
                accept=(200, *_NO_REFERRERS),
                what=what,
                headers={"Accept": INDEX},
            )
            if response.status_code != 200:
                response.close()
                return None
            data = read(response, MAX_MANIFEST_BYTES, what)
            return read_manifest(data, response.headers.get("Content-Type", ""), what)

        index = self._retries.run(get) or self._manifest(_referrers_tag(digest), what)
        return entries(index, what) if index else []

    # Writing

    def has_blob(self, digest: str) -> bool:
        """Whether the repository has it."""
        response = self._retries.run(
            lambda: self._session.send(
                "HEAD", f"{self._path}/blobs/{digest}", accept=(200, 404), what=str(self.reference)
            )
        )
        response.close()
        return response.status_code == 200

    def push_blob(self, blob: Blob, step: str) -> None:
        """Send a blob that is not there yet; what broke off goes on where the registry says, or starts again."""
        watcher = self._retries.watcher
        if not self.has_blob(blob.digest):
            upload = Upload(self._session, f"{self._path}/blobs/uploads/", blob, f"push to {self.reference}")
            self._retries.run(lambda: upload.send(lambda done: watcher.progress(step, done, blob.size)))
        watcher.progress(step, blob.size, blob.size)

    def push_manifest(self, data: bytes, media_type: str, wanted: str) -> requests.Response:
        """Put a manifest or an index under a tag or under its digest."""
        what = f"push to {self.reference}"
        response = self._retries.run(
            lambda: self._session.send(
                "PUT",
                f"{self._path}/manifests/{wanted}",
                accept=(201, 202),
                what=what,
                headers={"Content-Type": media_type},
                body=lambda: data,
            )
        )
        response.close()
        named = response.headers.get("Docker-Content-Digest")
        if is_digest(named) and named != digest_of(data):
            raise wrong_digest(what, digest_of(data), str(named))
        return response

    def push_referrer(self, data: bytes, subject: Descriptor, entry: Descriptor) -> None:
        """Put a manifest that refers to ``subject``, so that `referrers` finds it."""
        response = self.push_manifest(data, MANIFEST, entry.digest)
        if "OCI-Subject" in response.headers:
            return
        # No API: the client keeps the list (distribution-spec, "Referrers Tag Schema"). Two clients at once may undo
        # each other's entry, so it is looked at again.
        tag, what = _referrers_tag(subject.digest), f"what is attached to {self.reference.at(subject.digest)}"
        for _ in range(5):
            there = self._manifest(tag, what)
            listed = entries(there, what) if there else []
            if entry.digest in [one.digest for one in listed]:
                return
            self.push_manifest(index_document([*listed, entry]), INDEX, tag)
        raise TransferError(f"{what}: somebody else writes it at the same time", hint="push again")


def _referrers_tag(digest: str) -> str:
    return digest.replace(":", "-")
